"""The fastest plan: the law, the search and the measured noise against independent ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.errors import UserError
from bigbatch.layout.fastest import Hardware, cheapest, frontier
from bigbatch.schedule.fastest import EDGES, Noise, Way, ladder, noise_along
from bigbatch.schedule.noise_scale import LINEAR, SQUARE_ROOT
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import constant, step_decay, warmup
from bigbatch.schedule.transform import adam, grow_batch
from tests.benchmarks import fastest as quadratic


@st.composite
def problems(draw):
    """Few parts, sizes and numbers of devices, with whatever times."""
    parts, sizes, devices = (draw(st.integers(1, most)) for most in (4, 3, 3))
    times = st.floats(0.01, 10)
    updates = draw(st.lists(times, min_size=parts * sizes, max_size=parts * sizes))
    seconds = draw(st.lists(times, min_size=sizes * devices, max_size=sizes * devices))
    there = Hardware(
        np.arange(1, sizes + 1),
        np.array([1, 2, 5][:devices]),
        np.reshape(seconds, (sizes, devices)),
        draw(st.sampled_from([0.0, 0.3, 30.0])),
        draw(st.sampled_from([0.5, 3.0])),
    )
    weights = draw(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (2.0, 1.0)]))
    return np.reshape(updates, (parts, sizes)), there, weights


def by_hand(updates, there, rows, columns):
    """Hours and cost of a sequence of decisions, one part after the other."""
    hours = cost = 0.0
    for part, (row, column) in enumerate(zip(rows, columns, strict=True)):
        seconds = updates[part, row] * there.seconds[row, column]
        if part and columns[part - 1] != column:
            seconds += there.restart_s
        hours += seconds / 3600
        cost += seconds / 3600 * there.devices[column] * there.price
    return hours, cost


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_other_sequence_is_cheaper(problem):
    updates, there, (a, b) = problem
    found = cheapest(updates, there, a, b)
    assert (np.diff(found.size) >= 0).all()
    hours, cost = by_hand(updates, there, found.size.tolist(), found.device.tolist())
    assert (found.hours, found.cost) == pytest.approx((hours, cost))
    parts, sizes = updates.shape
    least = min(
        a * hours + b * cost
        for rows in itertools.combinations_with_replacement(range(sizes), parts)
        for columns in itertools.product(range(len(there.devices)), repeat=parts)
        for hours, cost in [by_hand(updates, there, rows, columns)]
    )
    assert a * found.hours + b * found.cost == pytest.approx(least, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.01, 100))
def test_the_frontier_holds_the_best_for_every_price_of_an_hour(problem, weight):
    updates, there, _ = problem
    corners = frontier(updates, there)
    hours, costs = (np.array([each[i] for each in corners]) for i in (2, 3))
    assert (np.diff(hours) > 0).all() if len(corners) > 1 else True
    assert (np.diff(costs) < 1e-12).all()
    best = cheapest(updates, there, weight, 1.0)
    least = weight * best.hours + best.cost
    assert least * (1 - 1e-9) <= min(weight * hours + costs) <= least * 1.02


def test_one_device_takes_the_root():
    """Updates of a + B/c seconds: B = sqrt(a c B_noise), and (sqrt(a) + sqrt(B_noise/c))^2 each."""
    a, c = 0.05, 2_000.0
    scales = np.geomspace(10, 1e5, 37)
    sizes = ladder(4, 1e6, np.array([], np.int64))
    assert np.diff(np.log2(sizes[sizes > 100])).max() < 0.3
    there = Hardware(sizes, np.array([1]), (a + sizes / c)[:, None], 60.0)
    progress = np.linspace(1, 2, 37)
    updates = progress[:, None] * (1 + scales[:, None] / sizes)
    found = cheapest(updates, there, 1.0, 0.0)
    exact = (progress * (np.sqrt(a) + np.sqrt(scales / c)) ** 2).sum() / 3600
    assert exact < found.hours < 1.003 * exact
    best = np.sqrt(a * c * scales)
    inside = best > 100
    assert np.abs(np.log2(sizes[found.size] / best))[inside].max() < 0.2


PAPER = step_decay(0.1, 32, 0.9, boundaries_epochs=[9, 18, 24], factor=0.2)
REFERENCE = make_plan(PAPER, train_examples=1_437, epochs=30)


def way(reference=REFERENCE, first=10.0, last=2_000.0):
    parts = len(EDGES) - 1
    noise = Noise(np.geomspace(first, last, parts), np.full(parts, 0.1), np.full(parts, True))
    return Way.of(reference, noise)


def test_the_recipes_own_batches_are_the_recipe():
    found = way().plan_of(np.full(37, 32))
    assert found.diff(REFERENCE) is None
    assert np.allclose(way().updates(np.array([32])).sum(), REFERENCE.num_updates)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=37, max_size=37), st.booleans())
def test_a_plan_goes_the_same_way(factors, warms_up):
    """Whatever the sizes: the learning rates' sum (the way of the flow) and the noise, or less."""
    policy = warmup(PAPER, warmup_epochs=5) if warms_up else PAPER
    reference = make_plan(policy, train_examples=1_437, epochs=30)
    sizes = 16 * np.sort(factors)
    gone = way(reference)
    plan = gone.plan_of(sizes)
    expected = gone.updates(sizes)[np.arange(37), np.arange(37)].sum()
    assert expected - 1e-6 <= plan.num_updates <= expected + 1
    rates = plan.hypers["learning_rate"]
    ours, theirs = rates.sum(), reference.hypers["learning_rate"].sum()
    assert abs(ours - theirs) <= 2 * rates.max() + 6 * np.abs(np.diff(rates)).max()
    at = np.searchsorted(np.cumsum(rates), np.cumsum(rates) - rates, "right")
    assert at.size == plan.num_updates
    assert plan.num_examples == plan.batch_sizes.sum()
    grown = plan.batch_sizes >= 32
    assert (plan.noise_scales[grown] <= REFERENCE.noise_scales[0] * (1 + 1e-9)).all()


def test_the_rule_moves_what_it_moves():
    reference = make_plan(
        adam(constant(1e-3, 32), 0.9, 0.999, 1e-8), train_examples=1_437, epochs=3
    )
    gone = way(reference, 64, 64)
    plan = gone.plan_of(np.full(37, 128), SQUARE_ROOT)
    k = (1 + 64 / 32) / (1 + 64 / 128)
    assert plan.hypers["learning_rate"][5] == pytest.approx(1e-3 * np.sqrt(k))
    assert plan.hypers["eps"][5] == pytest.approx(1e-8 / np.sqrt(k))
    # Far above the noise scale no batch is worth more than 1 + B_noise / B_0 of the recipe's.
    large = way(reference, 0.01, 0.01).plan_of(np.full(37, 1_024), LINEAR)
    assert large.hypers["learning_rate"][0] == pytest.approx(1e-3, rel=1e-3)
    assert abs(large.num_updates - reference.num_updates) <= 1


def test_a_reference_that_grows_is_no_other():
    growing = make_plan(grow_batch(PAPER, 320), train_examples=1_437, epochs=30)
    gone = way(growing)
    assert gone.updates_of_each(growing.batch_sizes).sum() == pytest.approx(growing.num_updates)


def estimates(random, truth, count, batch_size=32, dimension=50):
    """Unbiased estimates of |G|^2 = 1 and of tr(S) = truth, scattered as a batch's are."""
    spread = truth / batch_size * np.sqrt(2 / dimension)
    squares = 1 + spread * random.normal(size=count)
    return squares, truth * (1 + 0.05 * random.normal(size=count))


def test_the_noise_of_a_run_is_found_with_its_error():
    random = np.random.default_rng(0)
    shares = np.sort(random.uniform(size=4_000))
    truth = 20 * np.exp(3 * shares)
    found = noise_along(shares, np.full(4_000, 32.0), *estimates(random, truth, 4_000))
    assert found.measured[8:].all()
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    off = np.log(found.scales / (20 * np.exp(3 * middles)))[6:]
    errors = found.errors[6:]
    assert 0.5 < np.sqrt(np.mean((off / errors) ** 2)) < 1.6
    assert (np.abs(off) < 4 * errors).all()


def test_what_is_not_known_comes_from_beside_it():
    random = np.random.default_rng(1)
    shares = np.linspace(0, 1, 2_000)
    squares, variances = estimates(random, np.full(2_000, 100.0), 2_000)
    squares[(shares > 0.4) & (shares < 0.6)] = np.nan
    squares[shares > 0.9] -= 1  # the gradient has gone
    found = noise_along(shares, np.full(2_000, 32.0), squares, variances)
    assert found.measured.sum() < 32
    assert np.abs(np.log(found.scales / 100)).max() < 0.3


@pytest.mark.parametrize("squares", [[np.nan] * 500, [-1.0] * 500, [1.0, 1.0]])
def test_no_noise_is_told(squares):
    count = len(squares)
    arrays = np.linspace(0, 1, count), np.full(count, 32.0), np.array(squares), np.ones(count)
    with pytest.raises(UserError, match="noise_small_batch_examples"):
        noise_along(*arrays)


def test_an_empty_ladder_is_told():
    with pytest.raises(UserError, match="at least 64 examples"):
        ladder(64, 40, np.array([32]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("decays", [True, False])
def test_quadratics_take_what_is_predicted(share, decays):
    """Isotropic, where the law is exact but for the size of a step, at any share of the best lr."""
    predicted, realised, hours, least = quadratic.isotropic(share, decays)
    assert realised == pytest.approx(predicted, rel=0.05)
    assert hours == pytest.approx(least, rel=0.01)


def test_a_wrong_noise_costs_little_where_the_batch_is_far_below_it():
    hours = quadratic.wrong_noise(0.5)
    assert 1 < hours[0.5] / hours[1.0] < 1.03
    assert 0.97 < hours[2.0] / hours[1.0] < 1
