"""`--until`: a start that ends before the run does, and what it says where it cannot."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import cli, models
from bigbatch.errors import UserError
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.until import until
from tests import perceptron_run
from tests.storm import ROOT, records


def plan_of(sizes, train_examples=1_000):
    ones = np.ones(len(sizes))
    hypers = {"learning_rate": ones, "momentum": 0 * ones}
    sizes = np.array(sizes)
    return Plan(train_examples, sizes.sum() / train_examples, "linear", sizes, hypers)


def end_of(end, plan):
    """Updates done where a start ends."""
    ends = np.cumsum(plan.batch_sizes).tolist()
    passed = [end.passed(examples, k, plan.train_examples) for k, examples in enumerate(ends, 1)]
    return passed.index(next(filter(None, passed))) + 1 if any(passed) else None


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(SIZES, st.sampled_from(["epochs", "examples", "updates", "tokens"]), st.integers(1, 9_999))
def test_it_is_the_first_update_that_completes_the_time(sizes, unit, hundredths):
    plan, time = plan_of(sizes), Fraction(hundredths, 100)
    end = until(f"{hundredths / 100}_{unit}", plan, tokens_per_example=7)
    in_examples = {"epochs": time * 1_000, "examples": time, "tokens": time / 7}
    done, expected = 0, None
    for update, size in enumerate(sizes, 1):
        done += size
        if (update if unit == "updates" else done) >= in_examples.get(unit, time):
            expected = update
            break
    assert end_of(end, plan) == expected


@given(SIZES)
def test_a_stage_ends_where_the_next_begins(sizes):
    plan = plan_of(sizes)
    for number, stage in enumerate(plan.stages, 1):
        assert end_of(until(number, plan), plan) == stage.first_update + stage.num_updates
        assert until(str(number), plan) == until(number, plan)


def test_multiples():
    plan = plan_of([100] * 50)
    assert until("2k_examples", plan).value == 2_000
    assert until("4Ki_tokens", plan, 4).value == 1_024


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0", "given '0'; nearest: 1; allowed: a stage of the plan, 1 to 2, or a time"),
        (3, "given 3; nearest: 2"),
        ("-1", "nearest: 1"),
        ("two", "given 'two'; allowed: a stage"),
        ("", "given ''; allowed"),
        ("9" * 5_000, "allowed: a stage"),
        ("30 epochs", "a time such as 30_epochs"),
        ("0_epochs", "above 0"),
        ("1_tokens", "tokens_per_example"),
    ],
)
def test_what_is_no_time_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        until(given, plan_of([1, 2]))


def test_a_run_that_decides_its_stages_has_no_numbers_for_them():
    with pytest.raises(UserError, match="this run decides its stages while it goes on"):
        until("1", plan_of([1, 2]), decides=True)
    assert until("1_updates", plan_of([1, 2]), decides=True).value == 1


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """The command on a run of its own: status, and what it says."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(models.MODELS, "perceptron", perceptron_run.PerceptronConfig)

    def run(*arguments, name="run"):
        command = ["train", "--config=tests/perceptron_run.py", f"--workdir={tmp_path / name}"]
        status = cli.main([*command, *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_ends_goes_on_and_loses_nothing(train, tmp_path):
    whole = train(name="whole")
    status, _, err = train("--until=1")
    assert status == 3
    assert err.splitlines()[-1] == (
        "bigbatch: until 1: saved after update 9; without it, or with a later one, the same "
        "command continues"
    )
    for past in ("1", "0.2_epochs"):
        status, out, err = train(f"--until={past}")
        assert (status, out) == (3, "")
        assert f"bigbatch: until {past}: nothing was trained: the run is after update 9" in err
        assert err.count("\n") == 1
    status, _, err = train("--until=3")
    assert (status, "until: given '3'; nearest: 2" in err) == (2, True)
    assert train("--until=3", name="new")[0] == 2
    assert not (tmp_path / "new").exists()
    assert train("--until=15_updates")[0] == 3
    status, out, _ = train("--until=90_epochs")
    assert status == 0
    # Parameters, losses and updates; the seconds differ.
    goodput, line = out.splitlines()
    assert goodput.startswith("goodput ")
    assert "in 5 starts device" in goodput
    assert line.split(" examples")[0] == whole[1].splitlines()[-1].split(" examples")[0]
    logs = [records(tmp_path / name) for name in ("run", "whole")]
    assert logs[0] == logs[1]
    hashes = {
        (tmp_path / n / "result.json").read_text().split("sha256")[1] for n in ("run", "whole")
    }
    assert len(hashes) == 1
    assert train("--until=1")[0] == 0
