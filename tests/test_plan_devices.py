"""`bigbatch plan --devices=auto`: as many devices in each stage as pay."""

import itertools
import json
import re
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import cli
from bigbatch.config.file import load_config
from bigbatch.layout.fastest import Hardware, paying
from bigbatch.schedule.until import until

DEVICES = np.array([1, 2, 4])
TIMES = st.lists(st.lists(st.integers(1, 100), min_size=3, max_size=3), min_size=1, max_size=4)


@given(TIMES, st.sampled_from([0.0, 5.0, 200.0]), st.sampled_from([0.3, 0.7, 1.0]))
def test_no_other_devices_that_are_efficient_are_faster(times, restart_s, efficiency):
    """Against all ways to choose, where no neighbours want the same."""

    def pays(row):
        return [d for d, s in enumerate(row) if s * DEVICES[d] * efficiency <= row[0] * (1 + 1e-9)]

    wanted = [min(pays(row), key=lambda d: (row[d], d)) for row in times]
    times = [row for row, a, b in zip(times, wanted, [None, *wanted], strict=False) if a != b]
    there = Hardware(np.arange(len(times)), DEVICES, np.array(times, float), restart_s)
    chosen = paying(np.ones(len(times)), np.arange(len(times)), there, efficiency).tolist()

    def seconds(choice):
        changes = sum(a != b for a, b in itertools.pairwise(choice))
        return sum(row[d] for row, d in zip(times, choice, strict=True)) + restart_s * changes

    ways = itertools.product(*map(pays, times))
    assert all(d in pays(row) for row, d in zip(times, chosen, strict=True))
    assert seconds(chosen) == min(map(seconds, ways))


def test_a_plan_of_many_stages_is_a_few_parts():
    sizes = np.arange(1, 5_001)
    seconds = np.maximum(1.0, sizes[:, None] / 100 / DEVICES)
    chosen = paying(np.ones(5_000), sizes - 1, Hardware(sizes, DEVICES, seconds, 1.0), 0.6)
    assert (np.diff(chosen) >= 0).all()
    # 2 devices are efficient from 1.2 s of one on, 4 from 2.4 s.
    assert np.flatnonzero(np.diff(chosen)).tolist() == [118, 238]


SPEEDS = ("--examples-per-s=1300", "--allreduce-gbps=100", "--cost-per-device-hour=3")
ASKED = ("plan", "--config=cifar10:increase", "--devices=auto", "--max-devices=64", *SPEEDS)


def printed(capsys, *arguments):
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_hours_and_cost_are_those_of_the_plan_on_so_many(capsys):
    """A fixed number of devices takes what `plan --devices=N` says."""
    found = json.loads(printed(capsys, *ASKED, "--efficiency=0.6", "--json"))
    assert [row["devices"] for row in found["stages"]] == [1, 8, 32, 32]
    assert found["parts"] == [
        {"devices": 1, "until": 1},
        {"devices": 8, "until": 2},
        {"devices": 32, "until": None},
    ]
    hours = cost = 0.0
    for count, fixed in found["fixed"].items():
        own = (*ASKED[:2], f"--devices={count}", *SPEEDS, "--json")
        time = json.loads(printed(capsys, *own))["time"]
        assert fixed["hours"] == pytest.approx(time["seconds"] / 3600)
        assert fixed["cost"] == pytest.approx(time["cost"])
        for row, stage in zip(found["stages"], time["stages"], strict=True):
            if row["devices"] == int(count):
                hours += stage["seconds"] / 3600
                cost += stage["cost"]
    assert found["growing"]["hours"] == pytest.approx(hours + 2 * 60 / 3600)
    assert found["growing"]["cost"] == pytest.approx(cost + (8 + 32) * 60 / 3600 * 3)


def test_the_commands_are_printed(capsys):
    out = printed(capsys, *ASKED, "--efficiency=0.6", "--config.seed=3")
    assert "by stages: 2 changes of the devices, 60 s each" in out
    commands = [shlex.split(line, comments=True) for line in re.findall("bigbatch train .*", out)]
    ends = [command[-1] for command in commands]
    assert ends == ["--until=1", "--until=2", "--workdir=DIR"]
    plan = load_config("cifar10:increase", []).plan
    assert [until(end.partition("=")[2], plan).value for end in ends[:2]] == [23_438, 28_126]
    assert all("--config.seed=3" in command for command in commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--efficiency=2", "--max-devices=4"], "efficiency: given 2.0"),
        ([], "max_devices: given 'nothing'"),
        (["--max-devices=0"], "max_devices: given 0"),
        (["--max-devices=4", "--restart-s=-1"], "restart_s: given -1.0"),
        (["--max-devices=4", "--emit=megatron"], "none with --devices=auto"),
        (["--max-devices=4"], "bench: given 'nothing'"),
        (["--max-devices=4", "--examples-per-s=9"], "allreduce_gbps"),
        (["--max-devices=4", "--noise=run"], "noise: given 'run'; allowed: none without --fastest"),
    ],
)
def test_mistakes_are_told(capsys, arguments, message):
    assert cli.main(["plan", "--config=cifar10:increase", "--devices=auto", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)


def test_devices_that_are_none_and_a_run_that_decides(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config=digits:decay", "--devices=four"])
    assert "given 'four'; allowed: a whole number, or auto" in capsys.readouterr().err
    assert cli.main(["plan", "--config=digits:adaptive", "--devices=auto", "--max-devices=2"]) == 2
    assert "known beforehand" in capsys.readouterr().err
    assert cli.main(["plan", "--config=digits:decay", "--efficiency=0.5"]) == 2
    assert "none without --devices=auto" in capsys.readouterr().err
