"""Tokens as a unit of time and of batch sizes, against integers and fractions."""

import dataclasses
import json
import math
import types
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import errors
from bigbatch.bars import Bar
from bigbatch.checks import Checks
from bigbatch.commands import plan as plan_table
from bigbatch.commands.report.write import write_report
from bigbatch.config.config import read_config
from bigbatch.data.source import Data
from bigbatch.schedule.durations import size_in_examples
from bigbatch.schedule.intervals import Every, Intervals
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import batch_ramp, batch_stages, constant, cosine, stages, step_decay
from bigbatch.schedule.transform import grow_batch
from bigbatch.training import loop, progress
from tests import report_runs, test_event_files
from tests.own import regression

# Sequences of an epoch, tokens of a sequence, and a time in tokens: up to 15 trillion in all.
SIZES = st.integers(1, 2**31)
PER_EXAMPLE = st.integers(1, 2**13)
MULTIPLES = {"k": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20, "B": 10**9, "T": 10**12}


def first_reached(tokens, per_example):
    """The first position at which so many tokens are seen."""
    return math.ceil(Fraction(tokens) / per_example)


@settings(max_examples=100, deadline=None)
@given(train_examples=SIZES, per_example=PER_EXAMPLE, tokens=st.integers(1, 15 * 10**12))
def test_a_boundary_in_tokens_falls_on_its_example(train_examples, per_example, tokens):
    """Also where the time is within no whole example, and positions pass 2^31."""
    made = step_decay(
        1.0,
        16,
        boundaries_tokens=[tokens],
        factor=0.5,
        train_examples=train_examples,
        tokens_per_example=per_example,
    )
    position = first_reached(tokens, per_example)
    rates = made.at(np.array([position - 1, position]) / train_examples).hyper["learning_rate"]
    assert rates.tolist() == [1.0, 0.5]


@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(1, 9999),
    multiple=st.sampled_from(list(MULTIPLES)),
    per_example=st.sampled_from([1, 3, 1000, 2048, 8192]),
)
def test_batch_sizes_in_tokens(number, multiple, per_example):
    checks = Checks()
    found = size_in_examples(checks, "batch_size", f"{number}{multiple}_tokens", per_example)
    exact = Fraction(number * MULTIPLES[multiple], per_example)
    if exact.denominator == 1:
        assert (found, checks.problems) == (exact, [])
    else:
        (problem,) = checks.problems
        assert found is None
        again = size_in_examples(Checks(), "batch_size", problem.nearest, per_example)
        assert abs(again - exact) <= max(Fraction(1, 2), 1 - exact)


@pytest.mark.parametrize("text", ["768", "768_examples", "768_sequences", "0.75Ki", "1.5Mi_tokens"])
def test_one_batch_size_in_words(text):
    assert size_in_examples(Checks(), "batch_size", text, 2048) == 768


@settings(max_examples=100, deadline=None)
@given(
    per_example=PER_EXAMPLE,
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    steps=st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
)
def test_stages_by_tokens(per_example, sizes, steps):
    """Megatron's rule in integers: a stage starts with the first update at or after its start."""
    starts = np.cumsum([0, *steps])[: len(sizes)].tolist()
    text = " ".join(
        f"{start}{'_tokens' * (start > 0)}:{size * per_example}_tokens"
        for start, size in zip(starts, sizes, strict=True)
    )
    context = {"train_examples": 997, "tokens_per_example": per_example}
    end = starts[-1] + 100 * per_example
    plan = make_plan(stages(0.1, text, **context), tokens=end, **context)
    position, expected = 0, []
    while position * per_example < end:
        reached = sum(position * per_example >= start for start in starts)
        expected.append(sizes[reached - 1])
        position += expected[-1]
    assert plan.batch_sizes.tolist() == expected
    assert plan.num_examples == position


@settings(max_examples=100, deadline=None)
@given(
    train_examples=SIZES,
    per_example=PER_EXAMPLE,
    size=st.integers(1, 999),
    updates=st.integers(1, 200),
    more=st.floats(0, 1, exclude_max=True),
)
def test_a_run_ends_with_its_tokens(train_examples, per_example, size, updates, more):
    tokens = (updates - 1) * size * per_example + 1 + int(more * (size * per_example - 1))
    context = {"train_examples": train_examples, "tokens_per_example": per_example}
    plan = make_plan(constant(0.1, size), tokens=tokens, **context)
    assert plan.num_updates == updates
    same = make_plan(constant(0.1, size), epochs=plan.epochs, train_examples=train_examples)
    assert plan.fingerprint == same.fingerprint


def test_every_duration_takes_tokens():
    context = {"train_examples": 1000, "tokens_per_example": 8}
    ramp = {"initial_batch_size": 16, "increment_examples": 16}
    pairs = [
        (
            batch_ramp(constant(0.1, 64), ramp_tokens=4000, **ramp, **context),
            batch_ramp(constant(0.1, 64), ramp_examples=500, **ramp, train_examples=1000),
        ),
        (
            grow_batch(cosine(0.1, 64, epochs=2), 128, from_token=4000, **context),
            grow_batch(cosine(0.1, 64, epochs=2), 128, from_example=500, train_examples=1000),
        ),
        (
            cosine(0.1, 64, until_token=16_000, **context),
            cosine(0.1, 64, until_epoch=2),
        ),
    ]
    times = np.arange(2000) / 1000
    for ours, theirs in pairs:
        assert ours.at(times).batch_size.tolist() == theirs.at(times).batch_size.tolist()
        rates = [policy.at(times).hyper["learning_rate"].tolist() for policy in (ours, theirs)]
        assert rates[0] == rates[1]


@settings(max_examples=100, deadline=None)
@given(
    per_example=PER_EXAMPLE,
    every=st.integers(1, 10**6),
    first=st.integers(0, 10**10),
    size=st.integers(1, 10**4),
)
def test_an_interval_in_tokens(per_example, every, first, size):
    due = Intervals.of(
        {"log_every_tokens": every},
        {"evaluate_every": Every(1, "epochs"), "checkpoint_every": Every(1, "epochs")},
        per_example,
    ).log_every.due(first, size, 0, 10**9)
    crossed = (first + size) * per_example // every > first * per_example // every
    assert due == crossed


def test_a_plan_keeps_its_tokens():
    plan = make_plan(
        constant(0.1, 8), train_examples=100, tokens=4096 * 80, tokens_per_example=4096
    )
    again = Plan.from_json(plan.to_json())
    assert again.tokens_per_example == 4096
    assert json.loads(plan.to_json())["tokens_per_example"] == 4096
    plain = dataclasses.replace(plan, tokens_per_example=None)
    assert "tokens_per_example" not in plain.summary()
    assert plain.fingerprint == plan.fingerprint
    text = plan.to_json().replace('"tokens_per_example": 4096', '"tokens_per_example": "many"')
    with pytest.raises(errors.UserError, match="plan"):
        Plan.from_json(text)


def config_of(per_example=256, **changes):
    """A config whose data says, or does not, how many tokens an example has."""
    data = Data({"tokens": np.zeros((1000, 257), np.uint8)})
    data.tokens_per_example = per_example
    tree = {
        "tokens": 512_000,
        "ghost_batch_examples": 1,
        "microbatch_examples_per_device": 8,
        "evaluation_batch_examples": 8,
        "log_every_tokens": 4096,
        "evaluate_every_epochs": 1,
        "checkpoint_every_epochs": 1,
        "data": {"name": ":data"},
        "task": {"name": ":task"},
        "optimizer": {"name": "adamw"},
        "policy": {"name": "cosine", "learning_rate": 1e-3, "batch_size": "2Ki_tokens"},
        "transformations": [{"name": "warmup", "warmup_tokens": 51_200}],
    }
    own = {":data": lambda: data, ":task": lambda: types.SimpleNamespace(minimised="loss")}
    return read_config({**tree, **changes}, "run", own.__getitem__)


def problems_of(**changes):
    with pytest.raises(errors.UserError) as caught:
        config_of(**changes)
    return {problem.field: problem for problem in caught.value.problems}


def test_a_config_in_tokens():
    config = config_of()
    assert config.epochs == 2
    assert config.plan.num_updates == 250
    assert config.tree["policy"]["batch_size"] == "2Ki_tokens"
    rates = config.plan.hypers["learning_rate"]
    assert np.argmax(rates) == 25
    text = plan_table.text(config, devices=1)
    assert "512,000 tokens (256 an example)" in text
    assert "2.048k" in text
    twice = config_of(tokens=1_024_000, transformations=[], log_every_tokens=1e6)
    assert twice.plan.num_updates == 500


def test_tokens_that_the_data_does_not_know():
    found = problems_of(per_example=None)
    assert set(found) == {"tokens", "policy.batch_size", "transformations.warmup.warmup_tokens"}
    assert all("tokens_per_example" in problem.allowed for problem in found.values())
    plain = {"policy": {"name": "constant", "learning_rate": 1e-3, "batch_size": 8}}
    found = problems_of(per_example=None, tokens=None, transformations=[], **plain)
    assert "tokens" in found
    stated = [{"name": "batch_stages", "batch_size": "0:8 9M_tokens:16"}]
    found = problems_of(per_example=None, transformations=stated)
    assert found[
        "batch_size" if "batch_size" in found else "transformations.batch_stages.batch_size"
    ]


MISTAKES = {
    "both lengths": ({"epochs": 2}, "tokens"),
    "no time": ({"tokens": -1}, "tokens"),
    "a text": ({"tokens": "many"}, "tokens"),
    "half a sequence": (
        {"policy": {"name": "constant", "learning_rate": 0.1, "batch_size": "100_tokens"}},
        "policy.batch_size",
    ),
    "no words": (
        {"policy": {"name": "constant", "learning_rate": 0.1, "batch_size": "8_words"}},
        "policy.batch_size",
    ),
    "an interval of nothing": ({"log_every_tokens": 0}, "log_every_tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_config(name):
    changes, field = MISTAKES[name]
    assert field in problems_of(**changes)


def test_an_interval_needs_to_know_the_tokens():
    changes = {"policy": {"name": "constant", "learning_rate": 0.1, "batch_size": 8}}
    tree = {"per_example": None, "transformations": [], **changes}
    with pytest.raises(errors.UserError, match="log_every_tokens"):
        config_of(**tree, tokens=1)


def test_batch_stages_follow_the_rule_or_leave_the_rate():
    context = {"train_examples": 100, "tokens_per_example": 8}
    text = "0:8 800_tokens:16"
    for policy, expected in (
        (batch_stages(constant(0.1, 8), text, **context), [0.1, 0.1]),
        (batch_stages(constant(0.1, 8), text, True, **context), [0.1, 0.2]),
    ):
        settings_there = policy.at([0, 1])
        assert settings_there.batch_size.tolist() == [8, 16]
        assert settings_there.hyper["learning_rate"].tolist() == expected


def test_what_a_run_says_of_tokens(tmp_path):
    """Each record has those of its examples; TensorBoard shows them, the bar counts them."""
    run = regression.prepare()
    run.data.tokens_per_example = 7
    every = {"log_every_tokens": 700, "evaluate_every_tokens": 2240, "checkpoint_every_epochs": 3}
    runs = [tmp_path / name for name in ("decay", "again")]
    result = loop.train(run, runs[0], **every)
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["tokens"] / record["examples"] for record in records} == {7}
    trained = [record for record in records if "train_loss" in record]
    assert [record["tokens"] // 700 for record in trained[:-1]] == [*range(1, len(trained))]
    assert all("tokens_per_s" in record for record in trained)
    assert len([record for record in records if "test_loss" in record]) == 3
    assert result["tokens"] == 7 * result["examples"]
    assert f"{result['tokens'] / 1000:.4g}k tokens" in progress.result_line(result)
    shown = test_event_files.scalars(runs[0] / "tensorboard")["progress/tokens"]
    assert shown == [(record["update"], record["tokens"]) for record in records]
    moved = mock.Mock(spec=Bar)
    progress.move(moved, run, run.plan.row(2), 0.5)
    words = "update 3  batch 16  loss 0.5"
    moved.move.assert_called_once_with(16 * 7, total=result["tokens"], words=words)
    row = run.plan.row(0)
    assert f", {16 * 7} tokens, update 1 of" in progress.evaluation_line(
        run, row, progress.Progress(), {}
    )


@pytest.mark.parametrize(("per_example", "known"), [(512, True), (None, False), ("many", False)])
def test_the_report_speaks_of_tokens(tmp_path, per_example, known):
    path = report_runs.write_run(tmp_path, "decay", 0, report_runs.DECAY, lambda epoch: 1.0)
    plan = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps({**plan, "tokens_per_example": per_example}))
    found = write_report([path], tmp_path / "out")
    table, page = found.table.read_text(), found.page.read_text()
    assert ("tokens/s" in table, "examples/s" in table) == (known, not known)
    assert ("| 256,000 |" in table) == known
    assert ("1,000 training examples of 512 tokens." in page) == known
    assert ('value="tokens" checked' in page) == known


def test_an_adaptive_run_knows_its_tokens():
    policy = {"name": "adaptive", "learning_rate": 0.1, "momentum": 0.0}
    policy |= {"batch_size": "2Ki_tokens", "max_batch_size": "16Ki_tokens"}
    optimizer = {"name": "sgd"}
    config = config_of(policy=policy, transformations=[], optimizer=optimizer)
    ladder = [level.batch_size for level in config.controller.ladder]
    assert (ladder[0], ladder[-1]) == (8, 64)
    assert config.controller.plan().tokens_per_example == 256
    assert "tokens_per_example" not in config.groups["policy"]
