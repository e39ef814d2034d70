"""Configs: intervals, nested values, files, and fields that the command line changes."""

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from bigbatch.config.config import Config, read_config
from bigbatch.config.file import experiment_names, load_config, override, plain
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.intervals import Every, Intervals


def digits(**fields):
    """A small config's plain values."""
    return {
        "epochs": 10,
        "ghost_batch_examples": 32,
        "microbatch_examples_per_device": 64,
        "evaluation_batch_examples": 360,
        "log_every_updates": 1,
        "evaluate_every_epochs": 0.5,
        "checkpoint_every_examples": 5000,
        "data": {"name": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1},
        "optimizer": {"name": "momentum"},
        "policy": {
            "name": "step_decay",
            "learning_rate": 0.1,
            "batch_size": 32,
            "momentum": 0.9,
            "boundaries_epochs": [4, 8],
            "factor": 0.2,
        },
        "transformations": [{"name": "grow_batch", "max_batch_size": 160}],
    } | fields


def problems_of(tree):
    with pytest.raises(UserError) as caught:
        read_config(tree)
    return caught.value.problems


def fields_of(tree):
    return [problem.field for problem in problems_of(tree)]


def due_by_hand(every, batch_sizes, train_examples):
    """The updates within which an interval ends, found interval by interval."""
    edges = [*itertools.accumulate(batch_sizes, initial=0)]
    if every.unit == "updates":
        edges = [*range(len(edges))]
    # As the decimal that was written, not as the float nearest to it.
    length = Fraction(repr(every.value)) * (train_examples if every.unit == "epochs" else 1)
    due, end = [], length
    while end <= edges[-1]:
        due.append(next(i for i, edge in enumerate(edges[1:]) if edge >= end))
        end += length
    return sorted(set(due))


def due(every, batch_sizes, train_examples):
    position, found = 0, []
    for update, size in enumerate(batch_sizes):
        if every.due(position, size, update, train_examples):
            found.append(update)
        position += size
    return found


SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=60)
INTERVALS = st.one_of(
    st.builds(Every, st.integers(1, 20), st.just("updates")),
    st.builds(Every, st.integers(1, 50).map(lambda n: n / 10), st.just("updates")),
    st.builds(Every, st.integers(1, 500), st.just("examples")),
    st.builds(Every, st.integers(1, 4), st.just("epochs")),
    st.builds(Every, st.integers(1, 400).map(lambda n: n / 100), st.just("epochs")),
)


@settings(deadline=None)
@given(INTERVALS, SIZES, st.integers(50, 2000))
@example(Every(0.07, "epochs"), [50] * 300, 5_000)
@example(Every(0.1, "epochs"), [1437] * 3, 1_437)
@example(Every(3, "epochs"), [1000], 100)
def test_an_interval_is_due_where_it_ends(every, sizes, train_examples):
    assert due(every, sizes, train_examples) == due_by_hand(every, sizes, train_examples)


def test_an_interval_is_due_as_often_after_many_examples():
    # 1000 epochs of ImageNet at batch 8192, from the middle of a run on.
    every, first, n = Every(0.1, "epochs"), 8192 * 10**5, 1_281_167
    count = sum(every.due(first + 8192 * i, 8192, i, n) for i in range(10_000))
    ends = [Fraction(8192 * (10**5 + i), n) / Fraction(1, 10) for i in (0, 10_000)]
    assert count == math.floor(ends[1]) - math.floor(ends[0])


def test_a_config_is_read():
    config = read_config(digits(), "growing")
    assert isinstance(config, Config)
    assert config.experiment == "growing"
    assert (config.seed, config.label_smoothing, config.reproducible) == (0, 0.0, False)
    due_at = Intervals.of(config.intervals)
    assert due_at.log_every == Every(1, "updates")
    assert due_at.evaluate_every == Every(0.5, "epochs")
    assert due_at.checkpoint_every == Every(5000, "examples")
    assert due_at.keep_every is None
    assert config.data.info.train_examples == 1437
    assert config.plan.num_updates < config.source_plan.num_updates == -(-14_370 // 32)
    assert set(config.plan.batch_sizes.tolist()) == {32, 160}
    assert set(config.source_plan.batch_sizes.tolist()) == {32}
    assert max(config.layout(config.plan, 1).shapes) <= 64


def test_without_transformations_the_source_is_the_plan():
    config = read_config(digits(transformations=[]))
    assert config.source_plan is config.plan
    tree = digits()
    del tree["transformations"]
    assert read_config(tree).plan.fingerprint == config.plan.fingerprint


def test_transformations_are_applied_in_the_order_written():
    scale, grow = {"name": "scale", "factor": 2}, {"name": "grow_batch", "max_batch_size": 160}
    first = read_config(digits(transformations=[scale, grow])).plan.batch_sizes
    second = read_config(digits(transformations=[grow, scale])).plan.batch_sizes
    assert (first[0], first[-1]) == (64, 160)
    assert (second[0], second[-1]) == (64, 320)


@pytest.mark.parametrize("group", ["data", "model", "optimizer", "policy"])
@pytest.mark.parametrize("value", [None, 3, [], "text", "missing"])
def test_a_group_must_be_there(group, value):
    tree = digits(**{group: value})
    if value == "missing":
        del tree[group]
    given_value = "nothing" if value == "missing" else value
    assert Problem(group, given_value, "a group of fields") in problems_of(tree)


@pytest.mark.parametrize("group", ["model", "optimizer", "policy"])
@pytest.mark.parametrize("name", [None, 3, [1], {}, "no such name"])
def test_a_group_must_have_a_known_name(group, name):
    assert fields_of(digits(**{group: {"name": name}})) == [f"{group}.name"]


@pytest.mark.parametrize("value", [None, 3, "scale", {"name": "scale"}, [3], ["scale"]])
def test_transformations_are_a_list_of_groups(value):
    tree = digits(transformations=value)
    assert fields_of(tree) == ["transformations"]
    # Nor does it hide what is wrong with the plan.
    tree["policy"]["batch_size"] = 33
    assert fields_of(tree) == ["transformations", "policy.batch_size"]


@pytest.mark.parametrize(
    ("group", "field"),
    [
        ({}, "transformations.nothing.name"),
        ({"name": "scael", "factor": 2}, "transformations.scael.name"),
        ({"name": "scale"}, "transformations.scale.factor"),
        ({"name": "scale", "factor": -1}, "transformations.scale.factor"),
        ({"name": "scale", "factor": 2, "policy": 1}, "transformations.scale.policy"),
        ({"name": "grow_batch", "max_batch_size": 16}, "transformations.grow_batch.max_batch_size"),
        ({"name": "grow_batch", "max_batch_size": 99}, "transformations.grow_batch.max_batch_size"),
    ],
)
def test_a_mistake_in_a_transformation_is_named(group, field):
    assert field in fields_of(digits(transformations=[group]))


@pytest.mark.parametrize("stem", ["log_every", "evaluate_every", "checkpoint_every"])
def test_an_interval_is_given_in_exactly_one_unit(stem):
    tree = {name: value for name, value in digits().items() if not name.startswith(stem)}
    assert fields_of(tree) == [stem]
    both = tree | {f"{stem}_epochs": 1, f"{stem}_updates": 2}
    (problem,) = problems_of(both)
    assert problem.given == {f"{stem}_epochs": 1, f"{stem}_updates": 2}
    for unit in ("epochs", "examples", "updates"):
        assert fields_of(tree | {f"{stem}_{unit}": 0}) == [f"{stem}_{unit}"]
        config = read_config(tree | {f"{stem}_{unit}": 3})
        assert getattr(Intervals.of(config.intervals), stem) == Every(3, unit)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"microbatch_examples_per_device": 48}, "microbatch_examples_per_device"),
        ({"microbatch_examples_per_device": 0}, "microbatch_examples_per_device"),
        ({"microbatch_examples_per_device": -32}, "microbatch_examples_per_device"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"evaluation_batch_examples": 0}, "evaluation_batch_examples"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_a_field_out_of_range(fields, field):
    assert fields_of(digits(**fields)) == [field]


@pytest.mark.parametrize("name", sorted(set(digits()) - {"transformations"}))
def test_none_where_a_value_must_be(name):
    stem, _, _ = name.rpartition("_")
    field = stem if stem.endswith("_every") else name
    assert sorted(fields_of(digits(**{name: None}) | {"seed": None})) == sorted([field, "seed"])


def test_a_part_of_a_ghost_batch_may_be_a_microbatch():
    assert read_config(digits(microbatch_examples_per_device=16)).ghost_batch_examples == 32


def test_an_optimizer_without_momentum():
    (problem,) = problems_of(digits(optimizer={"name": "sgd"}))
    assert (problem.field, problem.given, problem.nearest) == ("policy.momentum", 0.9, 0.0)


def test_override_sets_one_field():
    tree = digits()
    override(tree, "policy.batch_size", "64")
    override(tree, "model.strides", "(2, 2, 1)")
    override(tree, "data.name", "cifar10")
    override(tree, "data.directory", "None")
    override(tree, "label_smoothing", "1e-1")
    override(tree, "new.group", "'5'")
    assert tree["policy"]["batch_size"] == 64
    assert tree["model"]["strides"] == [2, 2, 1]
    assert tree["data"] == {"name": "cifar10", "directory": None}
    assert tree["label_smoothing"] == 0.1
    assert tree["new"] == {"group": "5"}
    assert tree["optimizer"] == digits()["optimizer"]


@pytest.mark.parametrize("text", ["0:768 250k_examples:1536", "a=b", "{[1]: 2}", "((", "", "1 2"])
def test_override_takes_what_is_no_literal_as_a_text(text):
    tree = {}
    override(tree, "policy.batch_size", text)
    assert tree == {"policy": {"batch_size": text}}


@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        ({"log_every_epochs": 1, "log_every": 2}, "log_every_updates", {"log_every": 2}),
        ({"log_every_examples": 1}, "log_every_examples", {}),
        ({"boundaries_epochs": [1]}, "boundaries_examples", {}),
        ({"until_epoch": 1, "from_epoch": 2}, "until_example", {"from_epoch": 2}),
        ({"until_epochs": 1}, "until_epoch", {"until_epochs": 1}),
        ({"train_examples": 1, "epochs": 2}, "epochs", {"train_examples": 1}),
    ],
)
def test_override_replaces_a_time_in_another_unit(before, name, after):
    override(before, name, "7")
    assert before == after | {name: 7}


def test_override_names_an_entry_of_a_list():
    tree = digits(transformations=[{"name": "scale", "factor": 2}, {"name": "grow_batch"}])
    override(tree, "transformations.grow_batch.max_batch_size", "640")
    assert tree["transformations"][0] == {"name": "scale", "factor": 2}
    assert tree["transformations"][1] == {"name": "grow_batch", "max_batch_size": 640}


@pytest.mark.parametrize(
    ("name", "allowed", "nearest"),
    [
        ("transformations.grow.max_batch_size", "one of grow_batch", "grow_batch"),
        ("transformations.grow_batch", "a field of one of the list's groups, by its name", None),
        ("policy.boundaries_epochs.x.y", "nothing: the list holds no groups", None),
        ("epochs.x", "a field of the config; epochs holds no fields", None),
        ("policy.factor.x.y", "a field of the config; factor holds no fields", None),
    ],
)
def test_override_refuses_what_holds_no_fields(name, allowed, nearest):
    tree = digits()
    with pytest.raises(UserError) as caught:
        override(tree, name, "3")
    assert caught.value.problems == (Problem(name, "3", allowed, nearest),)
    assert tree == digits()


def test_plain_values_are_what_json_gives_back():
    given_tree = ConfigDict({"a": (1, (2, 3)), "b": ConfigDict({"c": [{"d": ()}]})})
    tree = plain(given_tree)
    assert tree == {"a": [1, [2, 3]], "b": {"c": [{"d": []}]}}
    assert type(tree["b"]) is dict
    assert plain({1: 2}) == {"1": 2}


@pytest.fixture
def written(tmp_path):
    """Writes a config file and gives its path."""

    def write(text):
        # Another name each time, so that no compiled file is found again.
        path = tmp_path / f"config{random.randrange(10**9)}.py"
        path.write_text(text)
        return str(path)

    return write


CONFIG = f"""
EXPERIMENTS = ("plain", "growing")
def get_config(experiment):
    tree = {digits()!r}
    return tree if experiment == "growing" else tree | {{"transformations": []}}
"""


def test_a_file_is_read(written):
    path = written(CONFIG)
    assert experiment_names(path) == ["plain", "growing"]
    assert load_config(path).experiment == "plain"
    growing = load_config(f"{path}:growing", [("seed", "3"), ("epochs", "2")])
    assert (growing.experiment, growing.seed, growing.epochs) == ("growing", 3, 2.0)
    assert growing.tree["epochs"] == 2


def test_a_file_without_experiments_takes_any_name(written):
    path = written(CONFIG.replace("EXPERIMENTS", "_"))
    assert experiment_names(path) == [""]
    assert load_config(path).experiment == ""
    assert load_config(f"{path}:growing").experiment == "growing"


def test_mistakes_of_the_command_line_and_of_the_file_come_together(written):
    path = written(CONFIG.replace("'width': 1", "'width': 0"))
    with pytest.raises(UserError) as caught:
        load_config(path, [("epochs.x", "1"), ("seed", "-1")])
    assert [p.field for p in caught.value.problems] == ["epochs.x", "seed", "model.width"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "no_such_module"),
        ("def get_config(", "SyntaxError"),
        ("x = 1", "get_config(experiment)"),
        ("def get_config(experiment): return {}[experiment]", "KeyError: 'wrong'"),
        ("def get_config(): return {}", "TypeError"),
        ("def get_config(experiment): pass", "returns a ConfigDict"),
        ("def get_config(experiment): return [1]", "returns a ConfigDict"),
        ("EXPERIMENTS = ['wrongly']\ndef get_config(experiment): return {}", "one of wrongly"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(written, text, said):
    path = written(text)
    with pytest.raises(UserError) as caught:
        load_config(f"{path}:wrong")
    (problem,) = caught.value.problems
    assert problem.field == "config"
    assert said in problem.allowed


def test_a_mistake_that_a_file_reports_itself_is_passed_on(written):
    text = "from bigbatch import constant\ndef get_config(experiment): constant(0.1, 0)"
    with pytest.raises(UserError, match="batch_size: given 0"):
        load_config(written(text))


@pytest.mark.parametrize("name", ["configs/digit.py", "digits.py", "configs", "", "pyproject.toml"])
def test_a_file_that_is_not_there(monkeypatch, name):
    monkeypatch.chdir(Path(__file__).parents[1])
    for function in (load_config, experiment_names):
        with pytest.raises(UserError) as caught:
            function(name)
        (problem,) = caught.value.problems
        assert (problem.field, problem.given) == ("config", name)
        nearest = {"configs/digit.py": "configs/digits.py", "digits.py": "digits"}
        assert problem.nearest == nearest.get(name)
