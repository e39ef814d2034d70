"""Inputs that nobody means, for the tests: whatever they are, they end in a sentence.

`python -m tests.fuzz configs|files COUNT` tries so many, seeded, in bounded memory and time.
"""

import contextlib
import copy
import io
import json
import resource
import signal
import sys
import traceback
import warnings

import numpy as np

from bigbatch.commands import plan as plan_table
from bigbatch.commands import plan_adaptive
from bigbatch.config import file as config_file
from bigbatch.config.config import read_config
from bigbatch.errors import RunError, UserError
from bigbatch.schedule.plan import Plan

MOST_BYTES, MOST_S = 8 * 2**30, 60
NUMBERS = [0, -1, 1, 2, 7, 0.5, 1e-310, 5e-324, 1e308, -1e308, 10**20, 10**400, 2**31, 2**63, 1e6]
NUMBERS += [float("nan"), float("inf"), 0.1, 1e-13, 1e8, 31, 33, 100_000]
TEXTS = [
    "",
    "a:b",
    "\0",
    "a\nb",
    "$x$",
    "<b>",
    "\udcff",
    "x" * 5_000,
    "../..",
    "~nobody",
    ":",
    "🙂",
]
OTHERS = [None, True, False, [], {}, [[]], [None], {"name": "momentum"}, {"name": {}}, [1, "2"]]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]


def trees():
    """The configs that come with the project, one of each experiment."""
    found = []
    for name in config_file._bundled():
        module = config_file._load_module(name)
        found += [config_file.plain(module.get_config(e)) for e in module.EXPERIMENTS]
    return found


def places(tree, prefix=()):
    """The places of all values in nested ones."""
    keys = tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    for key in keys:
        yield (*prefix, key)
        yield from places(tree[key], (*prefix, key))


def mutated(rng, tree):
    """Nested values of which one to three are others, gone, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        there = [*places(tree)]
        if not there:
            return tree
        *groups, last = there[rng.integers(len(there))]
        node = tree
        for group in groups:
            node = node[group]
        value = VALUES[rng.integers(len(VALUES))]
        how = rng.integers(8)
        if how == 0:
            del node[last]
        elif how == 1 and isinstance(node, dict):
            node[str(value)] = node.pop(last)
        elif how == 2 and isinstance(node, dict):
            others = [path[-1] for path in there if isinstance(path[-1], str)]
            node[others[rng.integers(len(others))]] = value
        elif how == 3:
            node[last] = [node[last], value]
        else:
            node[last] = copy.deepcopy(value)
    return tree


def damaged(rng, content: bytes) -> bytes:
    """A file's content, cut, with flipped bits, with a stretch of another, or grown."""
    made = bytearray(content)
    how = rng.integers(5)
    if how == 0 or not made:
        return bytes(made[: rng.integers(len(made) + 1)])
    if how == 1:
        for place in rng.integers(len(made), size=rng.integers(1, 20)):
            made[place] ^= 1 << rng.integers(8)
    elif how == 2:
        begin, end = sorted(rng.integers(len(made) + 1, size=2))
        made[begin:end] = rng.bytes(int(rng.integers(40)))
    elif how == 3:
        begin, end = sorted(rng.integers(len(made) + 1, size=2))
        made[begin:begin] = made[begin:end]
    else:
        made += rng.bytes(int(rng.integers(200)))
    return bytes(made)


def try_config(rng, known):
    tree = mutated(rng, known[rng.integers(len(known))])
    config = read_config(tree, "fuzz")
    config.intervals  # noqa: B018
    config.layout(config.plan, int(2 ** rng.integers(12)))
    plan_adaptive.text(config, devices=4) if config.controller else plan_table.text(
        config, devices=4
    )
    if config.plan.num_updates < 2**16:
        again = Plan.from_json(config.plan.to_json())
        assert again.fingerprint == config.plan.fingerprint


def many(what, count, one):
    """Calls a function with a generator of each seed; gives the seeds that ended otherwise."""
    bad = []
    for seed in range(count):
        rng = np.random.default_rng([seed, len(what)])
        signal.alarm(MOST_S)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("error")
                one(rng)
        except (UserError, RunError) as error:
            str(error).encode("utf-8", "backslashreplace")
        except BaseException:
            bad.append(seed)
            lines = [line[:200] for line in traceback.format_exc().splitlines()]
            print(what, seed, *lines[-24:], sep="\n", file=sys.stderr)
        signal.alarm(0)
    return bad


def main(what, count):
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    known = trees()
    bad = many(what, int(count), lambda rng: try_config(rng, known))
    print(json.dumps(bad))


if __name__ == "__main__":
    main(*sys.argv[1:])
