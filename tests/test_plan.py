"""The plan against the paper's totals and against a loop that lays out one update at a time."""

import math

import numpy as np
import pytest

from bigbatch import errors
from bigbatch.plan import Plan, make_plan
from bigbatch.policy import step_decay
from bigbatch.transform import grow_batch, raise_momentum, scale

PAPER = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
CIFAR10 = {
    "decay": (PAPER, 78_125),
    "hybrid": (grow_batch(PAPER, from_epoch=60, until_epoch=120), 34_376),
    "increase": (grow_batch(PAPER, 5120), 29_142),
    "increase_uncapped": (grow_batch(PAPER), 28_876),
    "increase_lr": (grow_batch(scale(PAPER, 5), 5120), 6_407),
    "increase_momentum": (grow_batch(raise_momentum(scale(PAPER, 5), 0.98), 5120), 2_305),
}


def cifar10_plan(name):
    return make_plan(
        CIFAR10[name][0], train_examples=50_000, epochs=200, batch_multiple_examples=128
    )


@pytest.mark.parametrize("name", CIFAR10)
def test_paper_totals(name):
    plan = cifar10_plan(name)
    assert plan.num_updates == CIFAR10[name][1]
    assert plan.num_examples == sum(plan.batch_sizes.tolist())
    assert plan.num_examples - plan.batch_sizes[-1] < 10_000_000 <= plan.num_examples


def test_paper_phases():
    """The (learning rate, batch size) pairs of the paper's table, read at each drop."""
    phases = {
        "increase": [(0.1, 128), (0.1, 640), (0.1, 3200), (0.032, 5120)],
        "increase_lr": [(0.5, 640), (0.5, 3200), (0.16, 5120), (0.032, 5120)],
        "increase_momentum": [(0.5, 3200), (0.16, 5120), (0.032, 5120), (0.0064, 5120)],
    }
    for name, expected in phases.items():
        plan = cifar10_plan(name)
        rows = [plan.row(plan.at_epoch(e) + 1) for e in (0, 60, 120, 160)]
        assert [row.batch_size for row in rows] == [b for _, b in expected]
        np.testing.assert_allclose(
            [row.hyper["learning_rate"] for row in rows], [lr for lr, _ in expected], rtol=1e-12
        )


@pytest.mark.parametrize("name", CIFAR10)
def test_against_one_update_at_a_time(name):
    """A loop with its own arithmetic for step decay: time in integers, sizes by division."""
    position, sizes, scales = 0, [], []
    while position < 200 * 50_000:
        drops = sum(position >= boundary * 50_000 for boundary in (60, 120, 160))
        if name == "decay":
            grown = 0
        elif name == "hybrid":
            grown = min(drops, 1)
        else:
            grown = drops
        base = {"increase_lr": 640, "increase_momentum": 3200}.get(name, 128)
        limit = 5120 if name not in ("decay", "hybrid", "increase_uncapped") else math.inf
        sizes.append(min(base * 5**grown, limit))
        scales.append(0.1 * 0.2**drops * 50_000 / (128 * 0.1))
        position += sizes[-1]
    plan = cifar10_plan(name)
    assert plan.batch_sizes.tolist() == sizes
    np.testing.assert_allclose(plan.noise_scales, scales, rtol=1e-12)


def test_json_round_trip():
    plan = cifar10_plan("increase_momentum")
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert plan.diff(again) is None


def test_diff_names_the_first_update():
    assert cifar10_plan("decay").diff(cifar10_plan("increase")) == math.ceil(60 * 50_000 / 128)
    short = make_plan(PAPER, train_examples=50_000, epochs=1, batch_multiple_examples=128)
    assert short.diff(cifar10_plan("decay")) == short.num_updates


def test_stated_batch_size_is_never_rounded():
    policy = step_decay(0.1, 100, 0.9, boundaries_epochs=[1], factor=0.2)
    with pytest.raises(errors.UserError) as caught:
        make_plan(
            grow_batch(policy, 1000), train_examples=1000, epochs=2, batch_multiple_examples=32
        )
    assert [(p.field, p.given, p.nearest) for p in caught.value.problems] == [
        ("batch_size", 100, 96),
        ("max_batch_size", 1000, 992),
    ]
