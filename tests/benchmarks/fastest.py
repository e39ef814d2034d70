"""The fastest plan on quadratics: `python -m tests.benchmarks.fastest`.

The loss is |w|^2 / 2 in d dimensions, an example's gradient w plus noise of covariance s I. The
expected loss after an update of B examples with learning rate e is known exactly,

    E|w'|^2 = (1 - e)^2 |w|^2 + e^2 d s / B,

and so is B_noise = d s / |w|^2. Nothing of the package's law is in it.
"""

import dataclasses
import itertools

import numpy as np

from bigbatch.layout.fastest import Hardware, cheapest
from bigbatch.schedule.fastest import Way, ladder
from bigbatch.schedule.plan import Plan

# d s, where |w|^2 begins at 1: B_noise begins at 20,000 examples, and ends at 160,000.
NOISE, END = 20_000.0, 1 / 8
BASE = 64
EXAMPLES_PER_S = 1_000.0


def seconds(size, overhead_s):
    """Of an update of so many examples."""
    return overhead_s + size / EXAMPLES_PER_S


def after(square, rate, size):
    """E|w|^2 after an update."""
    return (1 - rate) ** 2 * square + rate**2 * NOISE / size


def trained(rates, sizes, square=1.0):
    """E|w|^2 before the first update and after each."""
    updates = zip(rates, sizes, strict=True)
    return np.array(list(itertools.accumulate(updates, lambda s, u: after(s, *u), initial=square)))


def best_rate(square, size):
    """The learning rate that lowers the loss most."""
    return 1 / (1 + NOISE / square / size)


def reference(share, decays):
    """A recipe at a share of the best learning rate: all the way, or constant and in the end."""
    rates, square = [], 1.0
    while square > END:
        rates.append(share * best_rate(square if decays else END, BASE))
        square = after(square, rates[-1], BASE)
    size = np.full(len(rates), BASE)
    hypers = {"learning_rate": np.array(rates), "momentum": np.zeros(len(rates))}
    return Plan(10_000, len(rates) * BASE / 10_000, "linear", size, hypers)


def way_of(recipe, parts=36):
    """The way with the closed form's noise in each part, and E|w|^2 along it."""
    squares = trained(recipe.hypers["learning_rate"], recipe.batch_sizes)
    part = np.arange(recipe.num_updates) * parts // recipe.num_updates
    noise = np.exp(np.bincount(part, np.log(NOISE / squares[:-1])) / np.bincount(part))
    return Way(recipe, part, noise), squares


def planned(way, overhead_s):
    """The fastest plan on one device."""
    sizes = ladder(4, 2**18, np.array([BASE]))
    there = Hardware(sizes, np.array([1]), seconds(sizes, overhead_s)[:, None], 0.0)
    return way.plan_of(sizes[cheapest(way.updates(sizes), there, 1.0, 0.0).size])


def reached(squares, target):
    """Updates until |w|^2 is down to a target, interpolated in its logarithm; or infinity."""
    below = int(np.argmax(squares <= target))
    if squares[below] > target:
        return np.inf
    before, behind = np.log(squares[below - 1 : below + 1])
    return below - 1 + (before - np.log(target)) / (before - behind)


def to_the_loss(plan, target, overhead_s):
    """Updates and hours that a plan really takes to a loss, its last update going on as needed."""
    columns = [plan.hypers["learning_rate"], plan.batch_sizes]
    rates, sizes = (np.r_[column, np.repeat(column[-1], len(column))] for column in columns)
    count = reached(trained(rates, sizes), target)
    spent = np.r_[0.0, np.cumsum(seconds(sizes, overhead_s))] / 3600
    hours = np.interp(count, np.arange(len(spent)), spent) if np.isfinite(count) else np.inf
    return count, hours


def isotropic(share, decays, overhead_s=0.02):
    """Predicted and realised updates; hours really taken, and the least by brute force."""
    recipe = reference(share, decays)
    way, squares = way_of(recipe)
    plan = planned(way, overhead_s)
    taken = to_the_loss(plan, squares[-1], overhead_s)
    return plan.num_updates, *taken, brute_force(recipe, squares, overhead_s)


def brute_force(recipe, squares, overhead_s, phases=8):
    """The least hours of sizes that never fall, one for each phase of the loss.

    Each phase is trained through with each size, at the recipe's share of the best learning rate,
    which is known exactly here.
    """
    grid = np.unique(np.rint(BASE * 2 ** (np.arange(29) / 4)).astype(int)).tolist()
    ends = squares[np.arange(phases + 1) * (len(squares) - 1) // phases]
    rates = recipe.hypers["learning_rate"]
    # Of the best; where the recipe's rate is constant that share is not.
    shares = [rates[i] / best_rate(squares[i], BASE) for i in (0, len(rates) - 1)]
    decays = abs(shares[1] / shares[0] - 1) < 0.01
    best = np.zeros(len(grid))
    for start, end in itertools.pairwise(ends):
        hours = []
        for size in grid:
            way = [start]
            while way[-1] > end:
                share = shares[0] if decays else rates[0] / best_rate(way[-1], BASE)
                way.append(after(way[-1], share * best_rate(way[-1], size), size))
            hours.append(reached(np.array(way), end) * seconds(size, overhead_s) / 3600)
        best = np.minimum.accumulate(best) + hours
    return best.min()


def wrong_noise(share, decays=True, overhead_s=0.02):
    """Hours to the recipe's loss, by the factor on the true noise that the plan is made from."""
    true, squares = way_of(reference(share, decays))
    hours = {}
    for factor in (0.5, 1.0, 2.0):
        way = dataclasses.replace(true, scales=true.scales * factor)
        hours[factor] = to_the_loss(planned(way, overhead_s), squares[-1], overhead_s)[1]
    return hours


def main():
    print("| rate | share | predicted | realised | | hours / least | ", end="")
    print("noise x 1/2 | x 2 | where 10 s an update: x 1/2 | x 2 |")
    for decays, share in itertools.product((True, False), (0.1, 0.5, 0.9)):
        predicted, realised, hours, least = isotropic(share, decays)
        cells = [f"{predicted:,}", f"{realised:,.1f}", f"{realised / predicted:.3f}"]
        cells.append(f"{hours / least:.4f}")
        for overhead_s in (0.02, 10.0):
            wrong = wrong_noise(share, decays, overhead_s)
            cells += [f"{wrong[factor] / wrong[1.0]:.3f}" for factor in (0.5, 2.0)]
        print("|", "decays" if decays else "constant", "|", share, "|", *cells[:1], end=" | ")
        print(*cells[1:], sep=" | ", end=" |\n", flush=True)


if __name__ == "__main__":
    main()
