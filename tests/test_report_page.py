"""The interactive page: its data against the runs, and the page itself in a browser."""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from bigbatch.commands.report import linear_scaling, read_run, write_report
from bigbatch.commands.report.metric import Metric
from bigbatch.commands.report.timing import equal_budgets, seconds_at, stage_speeds
from tests.report_runs import DECAY, falling_loss, write_run

INCREASE = [(2, 20, 0.1), (2, 100, 0.1)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NAME = "in</script><b>crease"


def add_measurements(path, population):
    """Speeds that depend on the batch size, waits, and a noise scale from epoch 1 on."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "train_loss" in row:
            warm = row["epoch"] >= 1
            row |= {
                "examples_per_s": 100.0 + row["batch_size"],
                "input_wait_s": 0.01,
                "gradient_noise_scale": 50.0 * row["epoch"] if warm else None,
                "gradient_noise_scale_error": 7.0 if warm else None,
                **population,
            }
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = []
    for number, (name, stages) in enumerate({"decay": DECAY, "increase": INCREASE}.items()):
        for seed in range(3):
            loss = falling_loss(10 * number + seed, epochs=4)
            path = write_run(
                root,
                name,
                seed,
                stages,
                loss,
                accuracy=lambda epoch, s=seed: 0.8 + 0.01 * s * epoch,
            )
            # Logs from before it was said: what was measured then is of the data distribution.
            said = {} if name == "decay" else {"gradient_noise_population": "training set"}
            add_measurements(path, said)
            config = json.loads((path / "config.json").read_text())
            if name == "increase":
                (path / "config.json").write_text(json.dumps(config | {"experiment": NAME}))
            made.append(path)
    return made


@pytest.fixture(scope="module")
def report(run_dirs, tmp_path_factory):
    return write_report(run_dirs, tmp_path_factory.mktemp("out"))


def data_of(report):
    text = report.page.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))


def test_the_data_are_what_the_runs_logged(report, run_dirs):
    data = data_of(report)
    assert data["axes"] == ["epochs", "updates", "examples", "seconds"]
    assert [e["name"] for e in data["experiments"]] == ["decay", NAME]
    charts = {chart["id"]: chart for chart in data["charts"]}
    assert list(charts) == [
        "loss",
        "gap",
        "accuracy",
        "batch_size",
        "learning_rate",
        "noise_scale",
        "gradient_noise",
        "throughput",
    ]
    for number, experiment in enumerate(report.summary.experiments):
        series = charts["loss"]["series"][number]
        assert series["experiment"] == number
        curve = experiment.loss_curve
        for field in ("mean", "low", "high"):
            shown = series["y" if field == "mean" else field]
            assert shown == pytest.approx(getattr(curve, field).tolist(), rel=1e-4)
        assert series["x"]["epochs"] == pytest.approx(curve.epochs.tolist(), rel=1e-4)
        assert series["x"]["examples"] == pytest.approx(
            [1000 * epoch for epoch in series["x"]["epochs"]], rel=1e-4
        )
    sizes = charts["batch_size"]["series"][1]
    run = read_run(run_dirs[3])
    assert (sizes["y"][0], sizes["y"][-1]) == (20, 100)
    change = sizes["y"].index(100)
    assert sizes["x"]["examples"][change - 1] == 2000
    assert sizes["x"]["seconds"][-1] == pytest.approx(2000 / 120 + 2000 / 200, rel=1e-4)
    measured, beside = charts["gradient_noise"]["series"][2:]
    assert measured["x"]["epochs"][0] == 1
    assert measured["y"] == pytest.approx([50 * e for e in measured["x"]["epochs"]], rel=1e-4)
    low, high = np.array(measured["low"]), np.array(measured["high"])
    np.testing.assert_allclose(high - low, 14, atol=0.02)
    assert (beside["label"], beside["y"][-1]) == ("batch size", 100)
    assert run.training["gradient_noise_scale"].size == 120


def test_seconds_are_the_sums_of_the_records_own():
    training = {
        "examples": np.array([10.0, 30.0, 40.0]),
        "examples_per_s": np.array([5.0, math.nan, 20.0]),
    }

    class Run:
        pass

    run = Run()
    run.training = training
    # The middle record has no speed: the others' 20 examples took 2.5 s.
    got = seconds_at(run, np.array([0.0, 5.0, 10.0, 30.0, 40.0, 41.0]))
    np.testing.assert_allclose(got, [0, 1, 2, 2 + 2.5, 2 + 2.5 + 0.5, np.nan])


def test_stages_and_equal_budgets(run_dirs):
    decay, increase = ([read_run(path) for path in part] for part in (run_dirs[:3], run_dirs[3:]))
    speeds = stage_speeds(increase)
    assert [speed.examples_per_s for speed in speeds] == pytest.approx([120, 200])
    assert [speed.seconds for speed in speeds] == pytest.approx([2000 / 120, 10])
    updates, examples, seconds = equal_budgets([decay, increase], Metric("accuracy"))
    assert (updates.unit, updates.amount) == ("updates", 120)
    # After 120 of its updates decay has seen 2,400 examples; its last evaluation was at 2,000.
    expected = [100 * (0.8 + 0.01 * seed * 2) for seed in range(3)]
    assert updates.values[0] == pytest.approx(expected)
    assert updates.values[1] == pytest.approx([80, 84, 88])
    assert (examples.amount, examples.values[0]) == (4000, pytest.approx([80, 84, 88]))
    assert seconds.amount == pytest.approx(2000 / 120 + 10)
    # 26.7 s are 3,200 examples of decay.
    assert seconds.values[0] == pytest.approx([80, 83, 86])


def test_the_tables_say_what_was_measured(report):
    text = report.page.read_text()
    for expected in ("at 120 updates", "at 4,000 examples", "at 26.7 seconds", "84.00 ± 4.00"):
        assert expected in text
    # 120 records waited 0.01 s each.
    assert "<td>1.20</td>" in text
    assert "<td>16.7</td><td>120</td>" in text


def test_where_linear_scaling_ends(report):
    """The medians of 50 times the epoch, and lr_max / (1 + B_noise / B) by hand."""
    rows = linear_scaling.rows(report.summary)
    assert [row[:6] for row in rows] == [
        ("decay", "1", "20", "0.1", "75", "data distribution"),
        ("decay", "2", "20", "0.02", "150", "data distribution"),
        (NAME, "1", "20", "0.1", "75", "training set"),
        (NAME, "2", "100", "0.1", "152", "training set"),
    ]
    # 2 (B + 75) / (2 B + 75) at B = 20, and the rule's double at 75 + 2 B examples.
    assert rows[0][6:] == ("0.165 (1.65x)", "115")
    assert rows[3][6:] == ("0.143 (1.43x)", "352")
    assert "Where linear scaling ends" in report.page.read_text()
    assert "## Where linear scaling ends" in report.table.read_text()


def test_a_name_cannot_leave_the_data(report):
    class Tags(html.parser.HTMLParser):
        found: list

    parser = Tags()
    parser.found = []
    parser.handle_starttag = lambda tag, attributes: parser.found.append(tag)
    parser.feed(report.page.read_text())
    assert "b" not in parser.found
    assert parser.found.count("script") == 2


PROBE = """
<script>
const count = (id) => document.querySelectorAll(`#chart-${id} path`).length;
const label = () => document.querySelector("#chart-loss svg").getAttribute("aria-label");
const seen = [label(), count("loss")];
document.querySelector("input[value=seconds]").click();
seen.push(label(), document.querySelector("#chart-gap svg").getAttribute("aria-label"));
document.querySelectorAll("button[data-experiment]")[0].click();
seen.push(count("loss"));
document.querySelectorAll("button[data-experiment]")[1].click();
seen.push(document.querySelector("#chart-loss svg").textContent);
document.querySelectorAll("button[data-experiment]")[0].click();
const svg = document.querySelector("#chart-batch_size svg");
const box = svg.getBoundingClientRect();
const at = { clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true };
svg.dispatchEvent(new PointerEvent("pointermove", at));
const tip = document.querySelector("#chart-batch_size .tip");
seen.push(tip.hidden, tip.textContent, document.body.scrollWidth <= innerWidth);
document.title = JSON.stringify(seen);
</script></body>"""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_works_in_a_browser(report, tmp_path, width):
    page = tmp_path / "probe.html"
    page.write_text(report.page.read_text().replace("</body>", PROBE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True
    )
    assert ":CONSOLE" not in done.stderr
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout, re.DOTALL).group(1)
    before, two, after, gap, one, none, hidden, tip, fits = json.loads(html.unescape(title))
    assert (before, after) == ("Training loss, by epochs", "Training loss, by seconds")
    assert gap.endswith("by epochs")  # it has no other axis
    assert (two, one, none) == (2, 1, "every experiment is hidden")
    assert not hidden
    assert tip.startswith("seconds ")
    assert "decay: 20" in tip
    assert fits
