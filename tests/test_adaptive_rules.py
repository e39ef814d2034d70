"""Rules for adaptive optimizers: caps, Seesaw as in its paper, weight decay; policies of today."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.commands import plan as plan_table
from bigbatch.config.config import read_config
from bigbatch.engine.optimizer import Adam, AdamW
from bigbatch.errors import UserError
from bigbatch.schedule.diagnostics import floors
from bigbatch.schedule.noise_scale import RULES
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import (
    batch_ramp,
    batch_stages,
    constant,
    cosine,
    exponential,
    warmup_stable_decay,
)
from bigbatch.schedule.transform import adam, doubling_only, grow_batch, scale, with_rule


@settings(max_examples=100, deadline=None)
@given(
    b1_floor=st.none() | st.floats(0, 0.99),
    b2_floor=st.none() | st.floats(0, 0.999),
    doubling=st.booleans(),
    factor=st.sampled_from([1, 2, 5]),
    multiple=st.sampled_from([1, 7, 16]),
)
def test_caps(b1_floor, b2_floor, doubling, factor, multiple):
    """However the batch came to be so large, 1 - b is k (1 - b), or what the floor leaves."""
    source = adam(cosine(1e-3, 112, epochs=3, final_learning_rate=1e-4), 0.9, 0.98, 1e-8)
    ruled = with_rule(source, "square_root", b1_floor=b1_floor, b2_floor=b2_floor)
    grown = grow_batch(scale(ruled, factor), 112 * 90)
    grown = doubling_only(grown) if doubling else grown
    plan = make_plan(grown, train_examples=5000, epochs=3, batch_multiple_examples=multiple)
    assert len(plan.stages) > 3
    k = plan.batch_sizes / 112
    floor = {"b1": b1_floor, "b2": 0.95 if b2_floor is None else b2_floor}
    for name, start in (("b1", 0.9), ("b2", 0.98)):
        expected = np.full(k.shape, start)
        if floor[name] is not None:
            expected = np.maximum(1 - k * (1 - start), min(floor[name], start))
        np.testing.assert_allclose(plan.hypers[name], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plan.hypers["eps"], 1e-8 / np.sqrt(k), rtol=1e-12)


def test_the_floor_that_binds_is_named_with_its_update():
    source = adam(exponential(1e-3, 100, factor=0.5, every_epochs=1), 0.9, 0.99)
    policy = grow_batch(with_rule(source, "square_root", b1_floor=0.5, eps="held"), 1600)
    plan = make_plan(policy, train_examples=4000, epochs=3)
    b1, b2 = floors(plan, policy)
    # 1 - b1 = 0.5 from 500 examples on, 1 - b2 = 0.05 likewise; one example before it is not held.
    first = int(np.argmax(plan.batch_sizes > 500))
    assert plan.batch_sizes[first - 1] <= 500 < plan.batch_sizes[first]
    for found, floor in ((b1, 0.5), (b2, 0.95)):
        assert f"from update {first:,} on (batch size {plan.batch_sizes[first]:,})" in found.warning
        assert f"{floor:g}" in found.warning
    assert plan.hypers["eps"].tolist() == [1e-8] * plan.num_updates
    small = grow_batch(with_rule(source, "square_root", b1_floor=0.5), 500)
    below = floors(make_plan(small, train_examples=4000, epochs=3), small)
    assert [found.warning for found in below] == [None, None]
    held = with_rule(source, "square_root")
    assert [found.name for found in floors(plan, held)] == ["b2_floor"]


def test_a_floor_above_the_start_holds_and_warns_only_of_growth():
    source = adam(constant(1e-3, 64), 0.9, 0.9)
    same = with_rule(source, "square_root")
    plan = make_plan(same, train_examples=640, epochs=1)
    assert [found.warning for found in floors(plan, same)] == [None]
    larger = scale(same, 2)
    plan = make_plan(larger, train_examples=640, epochs=1)
    assert plan.hypers["b2"].tolist() == [0.9] * 5
    assert "update 0" in floors(plan, larger)[0].warning


def seesaw(rate_at, first, size, factor, train_examples, epochs, most):
    """Seesaw's algorithm update by update: each cut by f is one by sqrt(f) and a batch times f."""
    position, rows = 0, []
    while position < epochs * train_examples:
        cuts = 0
        while rate_at(position) * factor ** (cuts + 1) <= first * (1 + 1e-12):
            cuts += 1
        b = size * factor**cuts
        rate = first / math.sqrt(factor) ** cuts
        if b > most:
            b, rate = most, first / factor**cuts * math.sqrt(most / size)
        rows.append((b, rate))
        position += b
    return rows


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_seesaw_is_its_paper(factor, power):
    """Constant between the cuts; past the cap the learning rate takes the whole cut."""
    made = with_rule(cosine(0.3, 16, power=power, epochs=4, final_learning_rate=0.003), "seesaw")
    plan = make_plan(grow_batch(made, 512, factor), train_examples=20_000, epochs=4)

    def rate_at(position):
        curve = math.cos(math.pi / 2 * position / 80_000) ** power
        return 0.003 + (0.3 - 0.003) * curve

    rows = seesaw(rate_at, 0.3, 16, factor, 20_000, 4, 512)
    assert plan.batch_sizes.tolist() == [size for size, _ in rows]
    np.testing.assert_allclose(plan.hypers["learning_rate"], [r for _, r in rows], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1.02, 8), power=st.sampled_from([1.0, 2.0]))
def test_seesaws_bound(factor, power):
    """At most 1 - 2/pi = 36 % fewer updates for the cosine of the paper; for the usual one half.

    Updates of B0/lr examples number the integral of lr: of cos(pi t/2) 2/pi, of its square 1/2.
    Steps of a factor f round the batch down, so they save less, and at most f times less.
    """
    source = with_rule(cosine(0.3, 1000, power=power, epochs=1), "seesaw")
    size = {"train_examples": 10**7, "epochs": 1}
    share, limit = 1 / make_plan(source, **size).num_updates, {1.0: 2 / math.pi, 2.0: 0.5}[power]
    smooth = make_plan(grow_batch(source, 10**6), **size).num_updates * share
    stepped = make_plan(grow_batch(source, 10**6, factor), **size).num_updates * share
    assert smooth == pytest.approx(limit, rel=2e-3)
    assert limit * (1 - 1e-3) <= stepped <= min(1, limit * factor) + 1e-3
    assert 1 - smooth <= 1 - limit + 1e-3


@settings(max_examples=60, deadline=None)
@given(rule=st.sampled_from(["linear", "square_root", "seesaw", "muon", "sign"]))
def test_the_time_constant_of_weight_decay_stays(rule):
    """B/(lr wd) is the source's at every update; held, it is not where lr is not in proportion."""
    source = adam(cosine(1e-3, 64, epochs=2, final_learning_rate=1e-4), 0.9, 0.99, 1e-8, 0.1)
    found = {}
    for kind in ("time_constant", "held"):
        ruled = grow_batch(with_rule(source, rule, weight_decay=kind), 640)
        plan = make_plan(ruled, train_examples=3000, epochs=2)
        before = source.at(plan.first_examples / 3000).hyper["learning_rate"] * 0.1 / 64
        after = plan.hypers["learning_rate"] * plan.hypers["weight_decay"] / plan.batch_sizes
        found[kind] = np.abs(after / before - 1).max()
    assert found["time_constant"] < 1e-12
    assert (found["held"] < 1e-12) == (rule == "linear")


def test_adamw_decays_as_the_plan_says():
    params, grads = {"w": np.float32([1.0, -2.0])}, {"w": np.float32([0.5, 0.25])}
    hyper = {"learning_rate": 0.01, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    optimizer = AdamW()
    assert "weight_decay" in optimizer.hyper_names(hyper)
    made = optimizer.transformation()
    state = made.init(params)
    state = optax.tree_utils.tree_set(state, **{n: np.float32(v) for n, v in hyper.items()})
    ours, _ = made.update(grads, state, params, num_examples=1)
    # After one update Adam's means are the gradient and its square.
    step = grads["w"] / (np.abs(grads["w"]) + 1e-6) + 0.3 * params["w"]
    np.testing.assert_allclose(ours["w"], -0.01 * step, rtol=1e-5)
    columns = {name: np.array([value]) for name, value in hyper.items()}
    assert AdamW().plan_problems(columns) == []
    assert [p.field for p in AdamW(weight_decay=0.1).plan_problems(columns)] == [
        "optimizer.weight_decay"
    ]
    assert [p.field for p in Adam().plan_problems(columns)] == ["optimizer.name"]


def test_policies_of_today():
    """OLMo's doubling, GPT-3's ramp, the late switch, growth in place of the decay of WSD."""
    context = {"train_examples": 1000, "tokens_per_example": 100}
    doubling = with_rule(adam(constant(4e-4, 8)), "square_root")
    doubling = batch_stages(doubling, "0:8 16k_tokens:16 50k_tokens:32", True, **context)
    plan = make_plan(doubling, tokens=100_000, **context)
    assert [(s.first_example, s.batch_size) for s in plan.stages] == [(0, 8), (160, 16), (512, 32)]
    rates = [stage.learning_rate for stage in plan.stages]
    np.testing.assert_allclose(rates, 4e-4 * np.sqrt([1, 2, 4]), rtol=1e-15)

    ramp = {"initial_batch_size": 4, "increment_examples": 4, "ramp_tokens": 30_000}
    plan = make_plan(batch_ramp(constant(1e-3, 16), **ramp, **context), tokens=10**5, **context)
    assert [stage.batch_size for stage in plan.stages] == [4, 8, 12, 16]
    assert [stage.first_example for stage in plan.stages] == [0, 100, 204, 300]

    late = batch_stages(constant(1e-3, 8), "0:800_tokens 80k_tokens:6400_tokens", **context)
    plan = make_plan(late, tokens=10**5, **context)
    assert [(s.num_updates, s.batch_size) for s in plan.stages] == [(100, 8), (4, 64)]

    times = {"warmup_epochs": 0.1, "decay_epochs": 0.4, "epochs": 1}
    stable = with_rule(warmup_stable_decay(1e-3, 8, final_learning_rate=1e-4, **times), "linear")
    plan = make_plan(grow_batch(stable, 80), epochs=1, train_examples=10_000)
    warm = plan.first_examples >= 1000
    np.testing.assert_allclose(plan.hypers["learning_rate"][warm], 1e-3, rtol=0.12)
    assert plan.batch_sizes[plan.first_examples < 6000].tolist() == [8] * 750
    assert plan.batch_sizes.max() > 64


@pytest.mark.parametrize("rule", [name for name in RULES if name != "linear_exact"])
def test_plan_says_where_the_evidence_ends_and_what_is_held(rule):
    config = read_config(
        {
            "epochs": 4,
            "ghost_batch_examples": 8,
            "microbatch_examples_per_device": 8,
            "evaluation_batch_examples": 8,
            "log_every_updates": 1,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 1,
            "data": {"name": "digits"},
            "model": {"name": "wide_resnet", "depth": 10, "width": 1},
            "optimizer": {"name": "adamw"},
            "policy": {"name": "cosine", "learning_rate": 1e-3, "batch_size": 8},
            "transformations": [
                {"name": "adam", "b2": 0.98, "weight_decay": 0.1},
                {"name": "with_rule", "rule": rule, "weight_decay": "time_constant"},
                {"name": "grow_batch", "max_batch_size": 64},
            ],
        }
    )
    text = plan_table.text(config, devices=1)
    assert RULES[rule].evidence in text
    assert len(RULES[rule].evidence) > 100
    # 1 - b2 reaches 0.05 at 2.5 times the batch size of 8: the next whole one is 24.
    held = "(batch size 24) b2 is held at its floor of 0.95"
    assert (held in text) == (rule == "square_root")
    assert ("weight_decay" in text.splitlines()[2]) == (rule != "linear")


ADAM = adam(constant(1e-3, 64))
MISTAKES = {
    "floor": (lambda: with_rule(ADAM, "square_root", b1_floor=1.0), [("b1_floor", 0.999)]),
    "no floors": (
        lambda: with_rule(ADAM, "seesaw", b1_floor=0.5, b2_floor=0.5, eps="held"),
        [("b1_floor", None), ("b2_floor", None), ("eps", None)],
    ),
    "no weight decay": (
        lambda: with_rule(ADAM, "seesaw", weight_decay="time_constant"),
        [("weight_decay", None)],
    ),
    "negative": (lambda: adam(constant(1e-3, 64), weight_decay=-1), [("weight_decay", 0)]),
    "a factor that is none": (lambda: grow_batch(ADAM, 128, 1.0), [("factor", None)]),
    "a power that is none": (lambda: cosine(0.1, 8, power=0, epochs=1), [("power", None)]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, expected = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        make()
    assert [(p.field, p.nearest) for p in caught.value.problems] == expected
