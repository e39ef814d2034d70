"""Reading run directories, whole and damaged."""

import json
import re

import numpy as np
import pytest

from bigbatch.commands.report import read_run
from bigbatch.errors import UserError
from bigbatch.schedule import policy
from bigbatch.schedule.plan import make_plan
from tests.report_runs import DECAY, falling_loss, write_run


def log_lines(path):
    return (path / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_log(path, lines):
    (path / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path, "decay", 0, DECAY, falling_loss(0, epochs=4))


def test_a_run_is_read_as_it_was_written(run_dir):
    run = read_run(run_dir)
    rows = [json.loads(line) for line in log_lines(run_dir)]
    trained = [row for row in rows if "train_loss" in row]
    for field in trained[0]:
        np.testing.assert_array_equal(run.training[field], [row[field] for row in trained])
    since = [0, *(row["examples"] for row in trained[:-1])]
    np.testing.assert_array_equal(run.training["since_examples"], since)
    evaluated = [row for row in rows if "test_accuracy" in row]
    assert len(evaluated) == 4
    for field in evaluated[0]:
        np.testing.assert_array_equal(run.evaluations[field], [row[field] for row in evaluated])
    assert (run.experiment, run.seed, run.train_examples, run.epochs) == ("decay", 0, 1000, 4)
    assert run.config["data"]["name"] == "synthetic"
    assert run.result["updates"] == 200
    assert run.finished
    assert run.usable
    assert run.warnings == ()


def test_the_plan_of_a_real_run_is_read_as_its_summary(run_dir):
    plan = make_plan(policy.constant(0.1, 32, 0.9), train_examples=1000, epochs=3)
    (run_dir / "plan.json").write_text(plan.to_json())
    told = json.loads(json.dumps(plan.summary())) | {"tokens_per_example": None}
    assert read_run(run_dir).plan == told


def test_a_half_written_last_line_is_left_out_and_named(run_dir):
    lines = log_lines(run_dir)
    write_log(run_dir, [*lines[:-1], lines[-1][:40]])
    run = read_run(run_dir)
    assert run.warnings == (f"metrics.jsonl: line {len(lines)} is half-written and was left out",)
    assert run.training["update"].size + run.evaluations["update"].size == len(lines) - 1
    assert not np.isnan(run.training["since_examples"]).any()


@pytest.mark.parametrize(
    "damage",
    [
        b'{"update": 11, "exa\n',
        b"\x00\xff\xfe\x80\n",
        b"[1, 2]\n",
        b'"text"\n',
        b'{"update": 11, "train_loss": 1.0}\n',
        b'{"update": "eleven", "examples": 220, "train_loss": 1.0}\n',
        b'{"update": 11, "examples": 220, "train_loss": [1.0]}\n',
        b'{"update": NaN, "examples": 220, "train_loss": 1.0}\n',
        b'{"a": 1}, {"b": 2}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=range(10),
)
def test_a_damaged_line_costs_itself_and_the_average_after_it(run_dir, damage):
    lines = [line.encode() for line in log_lines(run_dir)]
    assert json.loads(lines[10])["update"] == 11
    (run_dir / "metrics.jsonl").write_bytes(b"".join([*lines[:10], damage, *lines[11:]]))
    run = read_run(run_dir)
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("metrics.jsonl: 1 line is damaged")
    assert "line 11;" in run.warnings[0]
    assert 11 not in run.training["update"]
    assert run.training["update"].size == 199
    unknown = np.isnan(run.training["since_examples"])
    np.testing.assert_array_equal(run.training["update"][unknown], [12])


def test_optional_fields_may_be_missing_or_null(run_dir):
    rows = [json.loads(line) for line in log_lines(run_dir)]
    del rows[3]["momentum"]
    rows[4]["train_loss"] = None
    write_log(run_dir, [json.dumps(row) + "\n" for row in rows] + ["\n"])
    run = read_run(run_dir)
    assert np.isnan(run.training["momentum"][3])
    assert np.isnan(run.training["train_loss"][4])
    assert run.warnings == ("the training loss is not finite from update 5 on",)


def test_records_written_again_by_a_resumed_run_count_once(run_dir):
    lines = log_lines(run_dir)
    again = [line.replace('"train_loss": ', '"train_loss": 7') for line in lines[5:30]]
    write_log(run_dir, [*lines[:30], *again, *lines[30:]])
    run = read_run(run_dir)
    np.testing.assert_array_equal(run.training["update"], np.arange(1, 201))
    assert (run.training["train_loss"][5:30] > 7).all()
    assert (run.training["train_loss"][:5] < 7).all()
    assert "25 training records were written again" in run.warnings[0]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"stages": []}'])
def test_a_plan_or_result_that_cannot_be_read_is_named(run_dir, text):
    for name in ("plan.json", "result.json"):
        (run_dir / name).unlink()
        if text is not None:
            (run_dir / name).write_text(text)
    run = read_run(run_dir)
    assert run.plan is None
    assert run.train_examples == 1000
    assert any("plan.json" in warning for warning in run.warnings)
    if text != '{"stages": []}':
        assert not run.finished
        assert any("result.json" in warning for warning in run.warnings)


def test_a_run_without_a_log_is_named(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    run = read_run(run_dir)
    assert not run.usable
    assert any("metrics.jsonl is missing" in warning for warning in run.warnings)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"experiment": 3}'])
def test_a_directory_that_is_no_run_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"run_dir: given '{tmp_path}'")):
        read_run(tmp_path)
