"""The interactive page: its data against the runs, and the page itself in a browser."""

import dataclasses
import html
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from bigbatch.commands.report import figures, linear_scaling, read_run, write_report
from bigbatch.commands.report.metric import Metric
from bigbatch.commands.report.summary import summarise
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
        series, *seeds = [s for s in charts["loss"]["series"] if s["experiment"] == number]
        assert [one["seed"] for one in seeds] == ["seed 0", "seed 1", "seed 2"]
        logs = np.log([one["y"] for one in seeds])
        np.testing.assert_allclose(np.exp(logs.mean(axis=0)), series["y"], rtol=1e-4)
        curve = experiment.loss_curve
        for field in ("mean", "low", "high"):
            shown = series["y" if field == "mean" else field]
            assert shown == pytest.approx(getattr(curve, field).tolist(), rel=1e-4)
        grid = data["grids"][series["grid"]]
        assert grid["epochs"] == pytest.approx(curve.epochs.tolist(), rel=1e-4)
        assert grid["examples"] == pytest.approx([1000 * e for e in grid["epochs"]], rel=1e-4)
    sizes = charts["batch_size"]["series"][1]
    run = read_run(run_dirs[3])
    assert (sizes["y"][0], sizes["y"][-1]) == (20, 100)
    change = sizes["y"].index(100)
    grid = data["grids"][sizes["grid"]]
    assert grid["examples"][change - 1] == 2000
    assert grid["seconds"][-1] == pytest.approx(2000 / 120 + 2000 / 200, rel=1e-4)
    measured, beside = charts["gradient_noise"]["series"][2:]
    epochs = data["grids"][measured["grid"]]["epochs"]
    assert epochs[0] == 1
    assert measured["y"] == pytest.approx([50 * e for e in epochs], rel=1e-4)
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


def test_what_was_run(run_dirs, tmp_path):
    """One row for the starts that share command, commit, hardware and versions; none is needed."""
    paths = [shutil.copytree(path, tmp_path / str(n)) for n, path in enumerate(run_dirs[:3])]
    start = {"command": "bigbatch compare", "commit": "abc-dirty", "hardware": "8 x <TPU>"}
    for hour, path in enumerate(paths[:2]):
        dates = [{"date": f"2026-01-0{day}T0{hour}:00:00+00:00"} for day in (2, 1)]
        starts = [start | date | {"versions": {"jax": "0.10.2"}} for date in dates]
        (path / "starts.json").write_text(json.dumps(starts))
    (paths[2] / "starts.json").write_text("[1")
    text = write_report(paths, tmp_path / "out").page.read_text()
    cells = ["decay</th>", "4</td>", "2026-01-01T00:00:00+00:00</td>", "2026-01-02T01:00:00+00:00"]
    row = next(line for line in text.splitlines() if cells[0] in line and "compare" in line)
    row = row[row.index("What was run") if "What was run" in row else 0 :]
    assert all(cell in row for cell in cells)
    assert "abc-dirty</td><td>8 x &lt;TPU&gt;</td><td>jax 0.10.2</td>" in row


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
    assert parser.found.count("script") == 3


PROBE = """
<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const element = (id) => document.getElementById(id);
const texts = (root) => [...root.querySelectorAll("*")].flatMap((node) =>
  node.shadowRoot ? texts(node.shadowRoot) : node.matches(".bk-tooltip-row-value, b ~ span") ?
  [node.parentNode.textContent.trim()] : []);
async function hover(id) {
  const view = await drawn[id].view;
  const area = view.canvas_view.events_el;
  const box = area.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  area.dispatchEvent(new PointerEvent("pointermove", { ...at, bubbles: true, isPrimary: true }));
  await wait(300);
  return texts(document);
}
const key = (id, name) => {
  element(`chart-${id}`).dispatchEvent(new KeyboardEvent("keydown", { key: name }));
  const { start, end } = drawn[id].figure.x_range;
  return [start, end];
};
const isLine = (renderer) => renderer.glyph instanceof Models.Line;
const lines = (id) => drawn[id].figure.renderers.filter(isLine).length;
const label = (id) => element(`chart-${id}`)?.getAttribute("aria-label");
(async () => {
  await wait(3000);
  const seen = { label: label("loss"), lines: [lines("loss")] };
  seen.hover = await hover("loss");
  seen.keys = [key("loss", "+"), key("loss", "ArrowRight"), key("loss", "0")];
  document.querySelector("input[value=seconds]").click();
  seen.labels = [label("loss"), label("gap")];
  element("seeds")?.click();
  seen.lines.push(lines("loss"));
  element("seeds")?.click();
  const first = document.querySelector("button[data-experiment]");
  first.click();
  seen.lines.push(lines("loss"));
  first.click();
  const scale = element("scale-loss");
  seen.scales = [scale.textContent, (scale.click(), drawn.loss.figure.y_scale.type)];
  seen.fixed = element("scale-gap")?.hidden;
  const filter = element("filter");
  if (filter) {
    filter.value = "E1";
    filter.dispatchEvent(new Event("input"));
    seen.filtered = lines("loss");
  }
  await wait(1000);
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  document.title = JSON.stringify(seen);
})();
</script></body>"""


def in_browser(page, tmp_path, width):
    """What the probe saw, and that the page has no word for the console."""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", PROBE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=30000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ":CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL).group(1)
    return json.loads(html.unescape(title))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser(report, tmp_path):
    seen = in_browser(report.page, tmp_path, 1280)
    assert seen["label"] == "Training loss, by epochs"
    assert seen["labels"] == [
        "Training loss, by seconds",
        "Loss difference from decay, in standard deviations between seeds, by epochs",
    ]  # it has no other axis
    assert seen["lines"] == [2, 2 + 6, 1]
    assert [text.split(":")[0] for text in seen["hover"]] == ["\u25a0 decay", f"\u25a0 {NAME}"]
    assert re.search(r": \S+ \(\S+ to \S+\) at \S+ epochs$", seen["hover"][0])
    zoomed, moved, whole = seen["keys"]
    assert whole == pytest.approx([0, zoomed[1] / 0.8])
    assert zoomed == pytest.approx([0.2 * whole[1], 0.8 * whole[1]])
    assert moved == pytest.approx([0.26 * whole[1], 0.86 * whole[1]])
    assert seen["scales"] == ["log", "LinearScale"]
    assert seen["fixed"]  # a difference has no logarithm
    assert seen["fits"]


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_twenty_long_runs_on_a_telephone(tmp_path):
    """20 runs of 10,000 updates each: a page below 2 MB that fits 360 pixels."""
    run_dirs = [
        write_run(tmp_path, f"e{n}", 0, [(10, 1, 0.1)], falling_loss(n, epochs=10))
        for n in range(20)
    ]
    made = write_report(run_dirs, tmp_path / "out")
    assert made.page.stat().st_size < 2e6
    seen = in_browser(made.page, tmp_path, 360)
    assert seen["lines"][0] == 20
    assert seen["filtered"] == 11  # e1 and e10 to e19
    assert seen["fits"]


# Machado, Oliveira and Fernandes (2009), the whole of each deficiency, on linear sRGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(linear):
    """CIE L*a*b* of linear sRGB, under D65."""
    xyz = np.array(XYZ) @ np.clip(linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    colours = [figures.REFERENCE_COLOUR, *figures.COLOURS]
    seen = []
    for colour in colours:
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        seen.append(lab(np.array(VISION[vision]) @ linear))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 12  # 2.3 is just noticed


def test_a_colour_goes_with_a_name(run_dirs):
    def look(names):
        runs = [dataclasses.replace(read_run(run_dirs[0]), experiment=name) for name in names]
        return figures.styles(summarise(runs))

    alone = look(["decay", "increase", "e1"])
    among = look(["decay", "adaptive", "e1", "large", "hybrid", "increase"])
    for name in ("decay", "increase", "e1"):
        assert alone[name].colour == among[name].colour
    many = look(["decay", *(f"e{n}" for n in range(16))])
    assert len({(style.colour, style.dash) for style in many.values()}) == 17
