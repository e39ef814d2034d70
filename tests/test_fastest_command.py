"""`bigbatch plan --fastest` as a user gives it, and the policy that trains what it prints."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.commands.critical.limits import Limit
from bigbatch.commands.fastest.answer import calibrated
from bigbatch.config.file import load_config
from bigbatch.errors import UserError
from bigbatch.schedule.fastest import EDGES, Noise
from bigbatch.schedule.plan import Plan

MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2
SPEEDS = ("--examples-per-s=10000", "--update-s=0.002")


def records(noise_of, count=800, batch_size=32, train_examples=1_437):
    """A log whose updates measured a noise exactly."""
    for update in range(1, count + 1):
        examples = update * batch_size
        yield {
            "update": update,
            "examples": examples,
            "epoch": examples / train_examples,
            "batch_size": batch_size,
            "train_loss": 1.0,
            "gradient_square": 2.0,
            "gradient_variance": 2.0 * noise_of((update - 0.5) / count),
            "gradient_noise_population": "training set",
        }


def write_log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def log(tmp_path):
    """B_noise rises from 40 to 400 examples."""
    return write_log(tmp_path / "metrics.jsonl", records(lambda share: 40 * 10**share))


def asked(log, *more, config="digits:decay"):
    return ["plan", f"--config={config}", "--fastest", f"--noise={log}", *SPEEDS, *more]


def printed(capsys, *arguments):
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_is_that_of_the_closed_form(log, capsys):
    told = printed(capsys, *asked(log, "--max-batch-size=1024", "--config.ghost_batch_examples=4"))
    sizes = np.array([stretch["batch_size"] for stretch in told["stretches"]])
    assert (np.diff(sizes) > 0).all()
    # a c B_noise, a of the update and c examples a second.
    root = np.sqrt(0.002 * 10_000 * np.array([40.0, 400.0]))
    assert np.abs(np.log2(sizes[[0, -1]] / root)).max() < 0.5
    share = told["recipes"]["this recipe"]["hours"] / told["recipes"]["fastest"]["hours"]
    noise = 40 * 10**MIDDLES
    assert np.allclose(told["noise_scales"][6:], noise[6:], rtol=0.02)
    lengths = np.diff(EDGES) * told["recipes"]["this recipe"]["updates"]
    cost = (np.sqrt(0.002) + np.sqrt(noise / 10_000)) ** 2
    least = (lengths / (1 + noise / 32) * cost).sum() / 3600
    assert told["recipes"]["fastest"]["hours"] == pytest.approx(least, rel=0.03)
    assert share > 1
    assert all(each["hours"] >= 0.999 * least for each in told["recipes"].values())
    assert all(factor >= 1 for factor in told["wrong_noise"].values())


def test_the_printed_command_trains_the_plan(log, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = asked(log, "--max-devices=4", "--allreduce-gbps=10")
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    told = printed(capsys, *arguments)
    plan = Plan.from_json(json.dumps(told))
    (tmp_path / "fastest.json").write_text(json.dumps(told))
    words = shlex.split(re.search("bigbatch (train .*)", out)[1])
    overrides = [tuple(w.removeprefix("--config.").split("=", 1)) for w in words if ".policy" in w]
    overrides += [("transformations", "[]")]
    config = load_config(words[1].partition("=")[2], overrides)
    assert config.plan.diff(plan) is None
    assert config.plan.fingerprint == plan.fingerprint == told["fingerprint"]
    assert f"{plan.num_updates:,} updates" in out
    # The seed, say, may differ; the length of the recipe may not.
    load_config("digits:decay", [*overrides, ("seed", "3")])
    with pytest.raises(UserError, match="30, those of the recipe"):
        load_config("digits:decay", [*overrides, ("epochs", "20")])
    with pytest.raises(UserError, match="whose plan holds what they did"):
        load_config("digits:increase", overrides[:-1])
    (tmp_path / "fastest.json").write_text(plan.to_json())
    with pytest.raises(UserError, match="plan --fastest --json"):
        load_config("digits:decay", overrides)


def test_words(log, capsys, tmp_path):
    hardware = ("--max-devices=8", "--allreduce-gbps=10", "--cost-per-device-hour=2")
    assert cli.main(asked(log, *hardware)) == 0
    out = capsys.readouterr().out
    for text in (
        "least: hours",
        "of the training set: B_noise 4",
        "rule linear: lr times k^1",
        "95 % interval",
        "the paper's growth",
        "Seesaw",
        "doubling",
        "decided by a wrong noise",
        "corners",
    ):
        assert text in out
    assert "times less hours" in out
    assert "assumed" not in out


@pytest.mark.parametrize(
    ("rise", "update_s", "verdict"),
    [
        (1.3, 0.002, "keep this recipe: the fastest plan takes 1 times"),
        (2.5, 0.010, "do not grow: one batch size of"),
        (100, 0.002, "run the fastest plan: it takes 1."),
    ],
)
def test_the_verdict(tmp_path, capsys, rise, update_s, verdict):
    """A noise that hardly rises asks for one size; if that is the recipe's, for nothing."""
    log = write_log(tmp_path / "log.jsonl", records(lambda share: 50 * rise**share))
    assert cli.main(asked(log, f"--update-s={update_s}", "--max-batch-size=1024")) == 0
    assert verdict in capsys.readouterr().out


def test_adaptive_optimizers_take_the_root(log, capsys, tmp_path):
    told = printed(capsys, *asked(log, config="fashion_mnist:decay-adam"))
    assert told["rule"] == "seesaw"
    plan = Plan.from_json(json.dumps(told))
    rate, size = plan.hypers["learning_rate"][0], plan.batch_sizes[0]
    k = (1 + told["noise_scales"][0] / 32) / (1 + told["noise_scales"][0] / size)
    assert rate == pytest.approx(1e-3 * np.sqrt(k))


def test_limits_and_weights_move_along_the_frontier(log, capsys):
    hardware = ("--max-devices=4", "--allreduce-gbps=10", "--restart-s=0", "--max-batch-size=512")
    fast = printed(capsys, *asked(log, *hardware))
    corners = fast["frontier"]
    assert len(corners) > 2
    assert fast["recipes"]["fastest"]["hours"] == pytest.approx(corners[0]["hours"])
    frugal = printed(capsys, *asked(log, *hardware, "--weight=0:1"))
    assert frugal["recipes"]["fastest"]["cost"] == pytest.approx(corners[-1]["cost"])
    hours = corners[1]["hours"] * 1.0001
    within = printed(capsys, *asked(log, *hardware, f"--max-hours={hours}"))
    assert within["recipes"]["fastest"]["cost"] == pytest.approx(corners[1]["cost"])
    within = printed(capsys, *asked(log, *hardware, f"--max-cost={corners[1]['cost'] * 1.0001}"))
    assert within["recipes"]["fastest"]["hours"] == pytest.approx(corners[1]["hours"])


def test_the_picture_holds_the_points(log, drawn, capsys, tmp_path):
    hardware = ("--max-devices=8", "--allreduce-gbps=10")
    told = printed(capsys, *asked(log, *hardware, f"--plot={tmp_path}/frontier.png"))
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    lines = drawn[0].axes[0].lines
    assert len(lines[0].get_xdata()) == len(told["frontier"])
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in lines[2:]}
    assert points == {(each["hours"], each["cost"]) for each in told["recipes"].values()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-hours=1", "--max-cost=1"], "at most one of"),
        (["--max-hours=1e-9"], "the least that any plan here takes"),
        (["--max-cost=1e-9"], "the least that any plan here takes"),
        (["--weight=0:0"], "such as 20:1"),
        (["--weight=nan:1"], "such as 20:1"),
        (["--weight=3"], "such as 20:1"),
        (["--max-devices=0"], "max_devices: given 0"),
        (["--max-devices=2"], "allreduce_gbps"),
        (["--max-batch-size=8"], "max_batch_size: given 8"),
        (["--restart-s=-1"], "restart_s: given -1.0"),
        (["--devices=2"], "devices: given 2; allowed: none with --fastest"),
        (["--emit=megatron"], "emit: given 'megatron'"),
        (["--critical=none.json"], "critical: given 'none.json'"),
        (["--noise=nothing.jsonl"], "0 records"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_told(log, capsys, more, message):
    assert cli.main(asked(log, *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_what_lacks_is_told(log, capsys):
    assert cli.main(["plan", "--config=digits:decay", f"--noise={log}"]) == 2
    assert "none without --fastest" in capsys.readouterr().err
    assert cli.main(["plan", "--config=digits:decay", "--fastest", f"--noise={log}"]) == 2
    assert "bench: given 'nothing'" in capsys.readouterr().err
    assert cli.main(["plan", "--config=digits:decay", "--fastest", *SPEEDS]) == 2
    assert "noise: given 'nothing'" in capsys.readouterr().err
    assert cli.main(asked(log, config="digits:adaptive")) == 2
    assert "known beforehand" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), None, -1.0])
def test_a_log_without_noise_is_told(tmp_path, capsys, bad):
    rows = ({**row, "gradient_square": bad} for row in records(lambda share: 50.0))
    assert cli.main(asked(write_log(tmp_path / "bad.jsonl", rows))) == 2
    assert "noise_small_batch_examples" in capsys.readouterr().err


def pilot(tmp_path, **changes):
    """A run's directory with a log in it."""
    config = load_config("digits:decay", [])
    tree = {**config.tree, **changes, "experiment": "decay"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "plan.json").write_text(config.plan.to_json())
    rows = records(lambda share: 40 * 10**share, count=config.plan.num_updates)
    write_log(tmp_path / "metrics.jsonl", rows)
    return str(tmp_path)


def test_another_configs_noise_is_said_to_be_assumed(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    assert cli.main(asked(pilot(tmp_path / "own"))) == 0
    assert "assumed" not in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    assert cli.main(asked(pilot(tmp_path / "other", data={"name": "fashion_mnist"}))) == 0
    out = capsys.readouterr().out
    assert "assumed: the pilot's noise is this config's at the same share of the run" in out
    assert "differ in data" in out


def test_critical_batches_scale_the_noise():
    noise = Noise(np.full(37, 100.0), np.full(37, 0.1), np.full(37, True))
    found = calibrated(noise, [Limit(0, 200, 100, 300), Limit(30, 50, 40, np.inf)], 30)
    assert found.scales == pytest.approx(200 * (50 / 200) ** MIDDLES)
    low = np.log(2) + (np.log(50 / 40) - np.log(2)) * MIDDLES
    assert found.errors == pytest.approx(np.hypot(0.1, low / 1.96))
    endless = calibrated(noise, [Limit(3, np.inf, 70, np.inf)], 30)
    assert endless.scales == pytest.approx(70)
    with pytest.raises(UserError, match="begins above 0"):
        calibrated(noise, [Limit(3, 5, 0, 10)], 30)


def test_it_needs_no_jax(log):
    code = (
        "import sys; from bigbatch import cli; "
        f"cli.main({asked(log)!r}); "
        "assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
