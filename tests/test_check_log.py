"""Logs of runs with a fault each, which is to be named, and of sound ones."""

import json

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.errors import UserError
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import batch_stages, cosine, warmup
from bigbatch.schedule.trainers.faults import findings
from bigbatch.schedule.trainers.log import PRESETS, read_log

N = 1003
LENGTH = 16
END = 8 * N


def made_plan():
    recipe = warmup(cosine(0.1, 10, 0.9, epochs=8), warmup_epochs=1)
    sizes = "0:10 0.5_epochs:20 4_epochs:40"
    recipe = batch_stages(recipe, sizes, train_examples=N)
    plan = make_plan(recipe, train_examples=N, epochs=8)
    # The momentum moves with the last stage.
    momentum = np.where(plan.batch_sizes == 40, 0.95, 0.9)
    return type(plan)(N, 8.0, "linear", plan.batch_sizes, {**plan.hypers, "momentum": momentum})


PLAN = made_plan()
SIZES, RATES = PLAN.batch_sizes.tolist(), PLAN.hypers["learning_rate"].tolist()
MOMENTA, FIRSTS = PLAN.hypers["momentum"].tolist(), PLAN.first_examples.tolist()
LAST = PLAN.num_updates - 1


def curve(seen):
    """The recipe's learning rate, by its formula."""
    done = min(seen / N, 8) / 8
    falling = 0.05 * (1 + np.cos(np.pi * done))
    return 0.05 * (1 + np.cos(np.pi / 8)) * seen / N if seen < N else falling


def size_at(seen):
    return 10 if 2 * seen < N else 20 if seen < 4 * N else 40


def trained(size=None, rate=None, momentum=None, epoch_examples=None):
    """What a loop logs that has these functions of update and position in place of the plan's."""
    rows, update, seen = [], 0, 0
    while seen < END:
        now = size(update, seen) if size else size_at(seen)
        rows.append(
            {
                "update": update,
                "batch_size": now,
                "learning_rate": float(rate(update, seen) if rate else curve(seen)),
                "momentum": momentum(update) if momentum else 0.95 if seen >= 4 * N else 0.9,
                "examples": seen,
                "epoch": seen // (epoch_examples(seen) if epoch_examples else N),
            }
        )
        seen += now
        update += 1
    return rows


def table(rows, form=repr):
    names = list(rows[0])
    lines = [[form(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(map(",".join, [names, *lines]))


def before(values, update):
    return values[max(0, min(LAST, update) - 1)]


def microsteps(update, seen):
    return RATES[min(LAST, seen // 5)]


def after_a_resume():
    rows = trained()
    return [row | {"examples": row["examples"] - 60 * (row["update"] >= 100)} for row in rows]


def without_partial_batches():
    """A loader whose epoch ends with its last whole batch; the next epoch begins there."""
    rows, epoch, seen = trained(), 0, 0
    for row in rows:
        if seen + row["batch_size"] > N:
            epoch, seen = epoch + 1, 0
        row["epoch"] = epoch
        seen += row["batch_size"]
    return rows


def in_updates(update, seen):
    """A warm-up of 100 updates, where the plan's is one epoch."""
    return curve(N) * update / 100 if update < 100 else curve(seen)


LATE = "one update late (off by one)"
FAULTS = {
    "ignored ramp": (lambda: trained(size=lambda k, p: 40), "batch size", "the ramp is ignored"),
    "first stage": (lambda: trained(size=lambda k, p: 10), "batch size", "is held for ever"),
    "lr late": (lambda: trained(rate=lambda k, p: before(RATES, k)), "learning rate", LATE),
    "lr in microsteps": (lambda: trained(rate=microsteps), "learning rate", "2 an update"),
    "epoch cut short": (lambda: trained(epoch_examples=lambda p: 800), "epoch", "810 of 1,003"),
    "repeated": (after_a_resume, "position", "60 examples are repeated there"),
    "batch late": (lambda: trained(size=lambda k, p: before(SIZES, k)), "batch size", LATE),
    "momentum": (lambda: trained(momentum=lambda k: 0.9), "momentum", "it is not moved"),
    "partial batch": (without_partial_batches, "epoch", "its last partial batch, 13 of 1,003"),
    "warm-up": (lambda: trained(rate=in_updates), "learning rate", "is counted in updates, not"),
    "ranks": (lambda: trained(size=lambda k, p: size_at(p) // 8 * 8), "batch size", "8 ranks"),
    "lr stretched": (
        lambda: trained(rate=lambda k, p: curve(10 * k)),
        "learning rate",
        "2.46 times",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", [repr, "{:.6E}".format])
def test_a_fault_is_named(fault, form):
    rows, column, words = FAULTS[fault]
    log = read_log(table(rows(), form), "table", {})
    (said,) = findings(PLAN, log, "table", 0)
    assert said.startswith(f"{column}: ")
    assert words in said
    assert fault != "repeated" or "from update 100 on" in said


def json_lines(rows, **names):
    return "\n".join(json.dumps({names.get(n, n): v for n, v in row.items()}) for row in rows)


def done(rows):
    """Numbered and placed as after the update."""
    return [
        row | {"update": row["update"] + 1, "examples": row["examples"] + row["batch_size"]}
        | {"epoch": (row["examples"] + row["batch_size"]) / N}
        for row in rows
    ]  # fmt: skip


def megatron(rows, every=1):
    """Its lines, where the learning rate is that of the iteration to come."""
    lines = ["using world size: 8", ""]
    for row, rate in zip(done(rows), [*RATES[1:], RATES[-1]], strict=True):
        if row["update"] % every == 0:
            lines.append(
                f" [2026-08-01 10:00:00.000000] iteration {row['update']:8d}/{len(rows):8d} |"
                f" consumed samples: {row['examples']:12d} | elapsed time per iteration (ms): 9.5 |"
                f" learning rate: {rate:.6E} | global batch size: {row['batch_size']:5d} |"
                " lm loss: 1.0E+00 | loss scale: 1.0 | grad norm: 0.5 |"
            )
    return "\n".join(lines)


def olmo(rows):
    return "\n".join(
        json.dumps(
            {
                "step": row["update"],
                "optim/LR (group 0)": row["learning_rate"],
                "train/global batch size": row["batch_size"] * LENGTH,
                "throughput/total tokens": row["examples"] * LENGTH,
            }
        )
        for row in done(rows)
    )


def levanter(rows):
    rates = [{"optim/learning_rate": row["learning_rate"]} for row in rows]
    records = [{"step": step, "metrics": metrics} for step, metrics in enumerate(rates)]
    return "\n".join(f"INFO levanter.json_logger {json.dumps(record)}" for record in records)


def rounded(rows):
    return [row | {"learning_rate": float(np.float32(row["learning_rate"]))} for row in rows]


def renamed(rows, **names):
    return [{names.get(n, n): v for n, v in row.items()} for row in rows]


ROWS = trained()
RATE_ALONE = [{"Wall time": 1.5, "Step": r["update"], "Value": r["learning_rate"]} for r in ROWS]
SOUND = {
    "table": (table(ROWS), "table", {}),
    "four digits": (table(ROWS, "{:.4g}".format), "table", {}),
    "five decimals": (table(ROWS, "{:.5f}".format), "table", {}),
    "every tenth": (table(ROWS[::10]), "table", {}),
    "its own": (json_lines(done(ROWS)), "bigbatch", {}),
    "megatron": (megatron(ROWS), "megatron", {}),
    "megatron, every tenth": (megatron(ROWS, 10), "megatron", {}),
    "wandb": (
        table(renamed(ROWS, update="Step", learning_rate="run-3 - train/lr")), "wandb", {},
    ),
    "tensorboard": (table(RATE_ALONE), "tensorboard", {"learning_rate": "Value"}),
    "olmo_core": (olmo(ROWS), "olmo_core", {}),
    "levanter": (levanter(ROWS), "levanter", {}),
    "resumed, float32, still running": (json_lines(rounded(ROWS[:90] + ROWS[70:150])), "table", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_of_a_sound_log_nothing_is_said(name):
    text, preset, columns = SOUND[name]
    log = read_log(text, preset, columns, LENGTH if preset == "olmo_core" else 1)
    assert len(log["update"].values) >= 14
    assert "learning_rate" in log
    assert findings(PLAN, log, preset, PRESETS[preset].first_update) == []


def test_what_a_tracker_leaves_out_is_no_difference():
    gaps = [row | {"learning_rate": ""} if row["update"] % 3 else row for row in ROWS]
    evaluations = [{"_step": row["update"], "lr": None, "loss": 1.0} for row in ROWS]
    trained = renamed(ROWS, update="_step", learning_rate="lr")
    both = [each for pair in zip(trained, evaluations, strict=True) for each in pair]
    for text in (table(gaps), json_lines(both)):
        log = read_log(text, "wandb", {})
        assert log["learning_rate"].values[3] == RATES[3]
        assert findings(PLAN, log, "wandb", 0) == []
    log = read_log(json_lines([{"step": 5, "lr": float("inf")}]), "table", {})
    assert findings(PLAN, log, "table", 0)


def test_units_that_were_guessed_wrongly():
    (said,) = findings(PLAN, read_log(table(ROWS), "table", {}), "table", 1)
    assert "off by one; does the log count its updates from 0" in said
    in_tokens = [row | {"examples": row["examples"] * LENGTH} for row in ROWS]
    (said,) = findings(PLAN, read_log(table(in_tokens), "table", {}), "table", 0)
    assert "position: from update 1 on" in said
    assert "it is 16 times the plan's throughout: tokens" in said
    scaled = [row | {"learning_rate": row["learning_rate"] * 1000} for row in ROWS]
    (said,) = findings(PLAN, read_log(table(scaled), "table", {}), "table", 0)
    assert "it is 1000 times the plan's throughout" in said
    ends = [row | {"examples": row["examples"] + row["batch_size"]} for row in ROWS]
    (said,) = findings(PLAN, read_log(table(ends), "table", {}), "table", 0)
    assert "as if counted after the update" in said


def test_a_difference_without_a_name_is_told_with_its_place():
    rows = trained(rate=lambda k, seen: 0.033 if k == 200 else curve(seen))
    (said,) = findings(PLAN, read_log(table(rows), "table", {}), "table", 0)
    assert said.startswith(
        f"learning rate: from update 200 on, example {FIRSTS[200]:,}: 0.033, planned"
    )
    assert ";" not in said


@pytest.mark.parametrize(
    ("text", "preset", "columns", "field"),
    [
        ("", "table", {}, "columns"),
        ("update,loss\n1,2\n", "table", {}, "columns"),
        ("update,lr\n1,2\n", "megatrom", {}, "preset"),
        (" iteration 1/ 3 | learning rate: 1E-3 |\n", "table", {}, "preset"),
        ("step 5\n{\n5\n" + "{" * 100_000, "table", {}, "columns"),
        ("update,lr\n1,2\n", "table", {"learning_rat": "lr"}, "columns"),
        ("update,lr\n1,2\n", "table", {"learning_rate": "rate"}, "columns.learning_rate"),
    ],
)
def test_logs_that_cannot_be_read(text, preset, columns, field):
    with pytest.raises(UserError) as caught:
        read_log(text, preset, columns)
    assert caught.value.problems[0].field == field


def test_the_command_and_its_status(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    (tmp_path / "log.csv").write_text(table(ROWS))
    command = ["check-log", f"{tmp_path}/log.csv", f"--plan={tmp_path}/plan.json"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    columns = "batch_size and epoch and examples and learning_rate and momentum"
    assert out == f"327 updates of 327 compared, by {columns}\n"
    assert err == ""
    (tmp_path / "log.csv").write_text(table(FAULTS["momentum"][0]()))
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "it is not moved" in out
    assert err == f"bigbatch: {tmp_path}/log.csv is not the plan's run\n"
    assert cli.main([*command, "--config=digits:decay"]) == 2
    assert cli.main(["check-log", "/no/such", "--config=digits:decay"]) == 2
    assert capsys.readouterr().err.count("allowed:") == 2
