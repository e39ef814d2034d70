"""Reading runs, and the files of a report."""

import html.parser
import json
import math
import statistics
import struct
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
import scipy.stats

from bigbatch.commands.report import read_run, summarise, write_report
from bigbatch.commands.report.summary import MeanSd, difference
from bigbatch.commands.report.table import claims, markdown
from bigbatch.errors import UserError
from tests.report_runs import DECAY, falling_loss, write_run

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
INCREASE = [(2, 20, 0.1), (2, 100, 0.1)]
CONTROL = [(4, 100, 0.1)]


def log_lines(path):
    return (path / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path, "decay", 0, DECAY, falling_loss(0, epochs=4))


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Three seeds of a reference, of an experiment alike and of one with a larger loss."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    experiments = {"control": (CONTROL, 0.8), "decay": (DECAY, 0.0), "increase": (INCREASE, 0.0)}
    for number, (name, (stages, offset)) in enumerate(experiments.items()):
        for seed in range(4):
            loss = falling_loss(10 * number + seed, offset=offset, epochs=4)
            accuracy = 0.9 + 0.01 * seed - 0.1 * offset
            config = {"policy": {"batch_size": stages[-1][1], "steps": {}}, "model": {"depth": 16}}
            made.append(
                write_run(
                    root, name, seed, stages, loss, config=config, accuracy=lambda _, a=accuracy: a
                )
            )
    return made


@pytest.fixture(scope="module")
def report(run_dirs, tmp_path_factory):
    return write_report(run_dirs, tmp_path_factory.mktemp("out") / "deep" / "report")


def table_of(markdown):
    """{experiment: {column: text}} of the only table."""
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_report_says_what_the_runs_say(run_dirs, report):
    assert report.warnings == ()
    assert report.page.name == "report.html"
    rows = table_of(report.table.read_text())
    assert list(rows) == ["decay", "control", "increase"]
    assert [row["updates"] for row in rows.values()] == ["200", "40", "120"]
    assert [row["fewer updates"] for row in rows.values()] == ["1.0x", "5.0x", "1.7x"]
    sd = statistics.stdev([90, 91, 92, 93])
    assert rows["decay"]["test accuracy, %"] == f"91.50 ± {sd:.2f}"
    assert {row["runs"] for row in rows.values()} == {"4"}
    assert rows["decay"]["examples/s"] == "500"
    assert rows["decay"]["seconds"] == "8.0"
    assert rows["decay"]["curve gap"] == MISSING

    decay, control, increase = report.summary.experiments
    last_epoch = [
        statistics.fmean(r["train_loss"] for r in rows_of(run) if r["epoch"] > 3.001)
        for run in run_dirs[4:8]
    ]
    assert decay.train_loss.mean == pytest.approx(statistics.fmean(last_epoch))
    assert decay.train_loss.sd == pytest.approx(statistics.stdev(last_epoch))
    assert control.gap.rms > 4
    assert control.gap.rms_p == control.gap.smallest_p
    assert increase.gap.rms < 2
    assert not control.equal_noise
    assert increase.equal_noise
    markdown = report.table.read_text()
    assert "5.0 times fewer updates than decay (40 against 200)" in markdown
    assert (
        f"not at decay's noise scale; test accuracy difference {MINUS}8.00 ± 2.23 points"
        in markdown
    )


def rows_of(path):
    rows = map(json.loads, log_lines(path))
    return [row for row in rows if "train_loss" in row]


def test_curves_are_geometric_means_with_a_band_of_one_deviation(run_dirs):
    runs = [read_run(path) for path in run_dirs[4:8]]
    curves = summarise(runs).reference.loss_curve
    # 4 epochs are drawn with 5 points each, so a bin is 10 records of one update of 20 examples.
    logs = np.array(
        [np.log(run.training["train_loss"].reshape(20, 10).mean(axis=1)) for run in runs]
    )
    np.testing.assert_allclose(curves.epochs, 0.1 + 0.2 * np.arange(20))
    np.testing.assert_allclose(curves.updates, 5 + 10 * np.arange(20))
    np.testing.assert_allclose(np.log(curves.mean), logs.mean(axis=0))
    np.testing.assert_allclose(np.log(curves.high / curves.mean), logs.std(axis=0, ddof=1))
    np.testing.assert_allclose(np.log(curves.mean / curves.low), logs.std(axis=0, ddof=1))


def test_the_difference_of_accuracies_has_welchs_interval():
    own, other = [91.0, 92.5, 90.7, 91.1], [90.0, 90.2, 90.1]
    got = difference(MeanSd.of(own), MeanSd.of(other))
    expected = scipy.stats.ttest_ind(own, other, equal_var=False).confidence_interval(0.95)
    assert got.mean - got.half_width == pytest.approx(expected.low)
    assert got.mean + got.half_width == pytest.approx(expected.high)
    assert math.isnan(difference(MeanSd.of(own), MeanSd.of([90.0])).half_width)
    assert difference(MeanSd.of([90.0] * 3), MeanSd.of([91.0] * 3)).half_width == 0


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to, and fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags, self.text = [], [], set(), ""
        self.data = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.text += data
        elif not self.data:  # the first script is the data
            self.data = data


def test_the_page_needs_no_network_and_holds_what_the_table_holds(run_dirs, report):
    text = report.page.read_text()
    page = _Page(text)
    assert all(source.startswith("data:") for source in page.sources)
    assert "default-src 'none'" in text
    # What the charts' library names it does not ask for: the page's own rule forbids it.
    before, _, after = text.partition("<script>")
    text = before + after.partition("<script>")[2]
    assert "Bokeh.logger" in text
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    for call in ("fetch(", "XMLHttpRequest", "import(", "http://", "https://"):
        # A name space is no address that is asked.
        assert call not in text.replace("http://www.w3.org/2000/svg", "")
    for row in table_of(report.table.read_text()).values():
        for cell in row.values():
            assert cell in page.text
    assert "policy.batch_size" in page.text
    assert "model.depth" not in page.text  # the same everywhere
    assert "increase: 120 updates, 4 epochs" in page.text
    assert all(str(path) in page.text for path in run_dirs)


def test_figures_are_1600_pixels_wide(report):
    names = [path.name for path in report.figures]
    for path in report.figures:
        assert xml.etree.ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert names == ["growing_batch.png", "curve_gap.png", "schedules.png", "test_accuracy.png"]
    for path in report.figures:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", head[16:20]) == (1600,)


def test_a_report_of_the_same_runs_is_the_same_bytes(run_dirs, report, tmp_path):
    again = write_report(run_dirs, tmp_path)
    assert again.page.read_bytes() == report.page.read_bytes()
    assert again.table.read_bytes() == report.table.read_bytes()


def test_names_cannot_break_the_page_or_the_table(tmp_path):
    name = "a <b>|&\"'_x_"
    for seed in range(2):
        path = write_run(tmp_path, f"run{seed}", seed, DECAY, falling_loss(seed, epochs=4))
        config = json.loads((path / "config.json").read_text()) | {"experiment": name}
        (path / "config.json").write_text(json.dumps(config))
    report = write_report(sorted(tmp_path.glob("run*/*")), tmp_path / "out")
    page = _Page(report.page.read_text())
    assert "b" not in page.tags
    assert name in page.text
    assert r"a \<b\>\|\&" in report.table.read_text()


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "decay", seed, DECAY, falling_loss(seed, epochs=4), finished=seed < 2)
    write_run(tmp_path, "slow", 0, INCREASE, falling_loss(7, epochs=4), finished=False)
    report = write_report(sorted(tmp_path.glob("*/*")), tmp_path / "out")
    rows = table_of(report.table.read_text())
    assert rows["decay"]["runs"] == "2 (+1 unfinished)"
    assert rows["slow"]["runs"] == "1 (unfinished)"
    assert rows["slow"]["updates"] == "120"
    text = "\n".join(report.warnings)
    assert "seed_2: result.json is missing" in text
    assert "decay: 1 of 3 runs are not finished" in text
    assert "slow: no run is finished" in text
    assert "slow: no run is finished" in _Page(report.page.read_text()).text
    assert "slow: no run is finished" in report.table.read_text()


def test_runs_of_other_sizes_are_reported_and_named(tmp_path):
    for seed in range(2):
        loss = falling_loss(seed, epochs=6)
        write_run(tmp_path, "decay", seed, DECAY, loss)
        write_run(tmp_path, "small", seed, DECAY, loss, train_examples=500)
        write_run(tmp_path, "longer", seed, [(6, 20, 0.1)], loss)
    summary = summarise([read_run(path) for path in sorted(tmp_path.glob("*/*"))])
    gaps = {experiment.name: experiment.gap for experiment in summary.experiments}
    assert gaps["small"] is None
    assert gaps["longer"].epochs.max() == 3
    assert any("small: trained on 500 examples and decay on 1,000" in w for w in summary.warnings)
    assert any("longer: planned for 6 epochs and decay for 4" in w for w in summary.warnings)


def test_runs_of_less_than_an_epoch_are_compared_by_their_twentieths(tmp_path):
    half = [(0.5, 5, 0.1)]
    for seed in range(3):
        write_run(tmp_path, "decay", seed, half, falling_loss(seed, epochs=4))
        write_run(tmp_path, "same", seed, half, falling_loss(10 + seed, epochs=4))
        control = falling_loss(seed, epochs=4)
        write_run(tmp_path, "worse", seed, half, lambda epoch, f=control: 2 * f(epoch))
    summary = summarise([read_run(path) for path in sorted(tmp_path.glob("*/*"))])
    decay, same, worse = summary.experiments
    np.testing.assert_allclose(same.gap.centres, np.arange(0.0125, 0.5, 0.025))
    assert same.gap.rms < 2
    assert worse.gap.rms > 4
    assert worse.gap.loss_ratio == pytest.approx(2)
    last = [[r for r in rows_of(run.path) if r["epoch"] > 0.4751] for run in decay.runs]
    means = [statistics.fmean(r["train_loss"] for r in rows) for rows in last]
    assert decay.train_loss.mean == pytest.approx(statistics.fmean(means))
    text = markdown(summary)
    assert "mean over the last whole twentieth of the run" in text
    assert f"(epoch {round(worse.gap.max_epoch, 3):g})" in text


def test_runs_that_are_no_repetitions_are_named(tmp_path):
    write_run(tmp_path / "a", "decay", 0, DECAY, falling_loss(0, epochs=4))
    write_run(tmp_path / "b", "decay", 0, INCREASE, falling_loss(1, epochs=4), config={"x": 1})
    runs = [read_run(path) for path in sorted(tmp_path.glob("*/*/*"))]
    text = "\n".join(summarise(runs).warnings)
    assert "decay: 2 runs have the seed 0" in text
    assert "decay: its runs differ in the config field x" in text
    assert "decay: its runs have different plans" in text


def test_runs_that_decided_their_own_plans_are_one_experiment(tmp_path):
    plans = {0: [(2, 20, 0.1), (2, 100, 0.1)], 1: [(1, 20, 0.1), (3, 100, 0.1)]}
    for seed, stages in plans.items():
        write_run(tmp_path, "decay", seed, DECAY, falling_loss(seed, epochs=4))
        config = {"policy": {"name": "adaptive"}}
        loss = falling_loss(7 + seed, epochs=4)
        # The plan of seed 1 evaluates after the same epochs, but after fewer updates.
        accuracy = {0: lambda epoch: 0.8, 1: lambda epoch: 0.9}[seed]
        write_run(tmp_path, "grown", seed, stages, loss, config=config, accuracy=accuracy)
    report = write_report(sorted(tmp_path.glob("*/*")), tmp_path / "out")
    assert report.warnings == ()
    grown = report.summary.experiments[1]
    assert (grown.updates.mean, grown.updates_ratio) == (100, 2)  # 120 and 80; decay has 200
    assert (
        "2.0 times fewer updates than decay (100 ± 28 against 200)"
        in dict(claims(report.summary))["grown"]
    )
    np.testing.assert_allclose(grown.metric_curve.updates, [50, 80, 90, 100])
    np.testing.assert_allclose(grown.metric_curve.mean, 85)
    # Updates at the middle of each tenth of the first epoch, of the mean of both plans.
    np.testing.assert_allclose(grown.loss_curve.updates[0], np.mean([5, 5]))
    np.testing.assert_allclose(grown.loss_curve.updates[-1], np.mean([119, 79]))
    page = report.page.read_text()
    assert "grown, seed 0: 120 updates" in page
    assert "grown, seed 1: 80 updates" in page


def test_claims_say_no_more_than_the_runs_show(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "a", seed, INCREASE, falling_loss(seed, epochs=4))
        write_run(tmp_path, "b", seed, DECAY, falling_loss(9 + seed, offset=2.0, epochs=4))
    write_run(tmp_path, "c", 0, INCREASE, falling_loss(5, epochs=4))
    summary = summarise([read_run(path) for path in sorted(tmp_path.glob("*/*"))])
    said = dict(claims(summary))
    assert list(said) == ["b", "c"]  # without a "decay" the first is the reference
    assert "1.7 times more updates than a (200 against 120)" in said["b"]
    # However large the gap, 2 + 2 runs can be dealt in 3 ways only.
    assert "farther apart than in any other deal of these runs, which are too few" in said["b"]
    assert "p = 0.33" in said["b"]
    assert "as many updates as a (120)" in said["c"]
    assert "too few runs for an interval, n = 1 + 2" in said["c"]


@pytest.mark.parametrize("num_lines", [1, 3])
def test_a_run_that_has_just_begun_is_reported(run_dir, tmp_path, num_lines):
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").write_text("".join(log_lines(run_dir)[:num_lines]))
    report = write_report([run_dir], tmp_path / "out")
    assert [path.name for path in report.figures] == [
        "growing_batch.png",
        "schedules.png",
        "test_accuracy.png",
    ]
    assert table_of(report.table.read_text())["decay"]["training loss at the end"] == MISSING


def test_a_diverged_experiment_is_reported(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "decay", seed, DECAY, falling_loss(seed, epochs=4))
        write_run(tmp_path, "wild", seed, DECAY, lambda _: math.nan, accuracy=lambda _: math.nan)
    report = write_report(sorted(tmp_path.glob("*/*")), tmp_path / "out")
    rows = table_of(report.table.read_text())
    assert rows["wild"]["training loss at the end"] == rows["wild"]["test accuracy, %"] == MISSING
    assert any("training loss is not finite from update 1 on" in w for w in report.warnings)


def test_a_run_named_twice_counts_once_and_an_earlier_report_is_no_run(run_dir, tmp_path):
    out = run_dir.parent.parent / "report"
    write_report([run_dir], out)
    report = write_report([run_dir, f"{run_dir}/../seed_0", out, *out.iterdir()], out)
    assert len(report.summary.reference.runs) == 1


def test_all_mistakes_are_told_at_once(run_dir, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        write_report([run_dir, tmp_path / "empty", tmp_path / "absent"], taken)
    given = [(problem.field, problem.given) for problem in caught.value.problems]
    assert given == [
        ("run_dirs", str(tmp_path / "empty")),
        ("run_dirs", str(tmp_path / "absent")),
        ("out", str(taken)),
    ]
    with pytest.raises(UserError):
        write_report([tmp_path / "empty"], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_file_that_cannot_be_replaced_is_a_users_mistake(run_dir, tmp_path):
    (tmp_path / "out" / "growing_batch.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^out: given"):
        write_report([run_dir], tmp_path / "out")


def test_no_usable_run_is_a_users_mistake(run_dir, tmp_path):
    (run_dir / "metrics.jsonl").unlink()
    for given in ([run_dir], []):
        with pytest.raises(UserError, match="at least one run directory with a training record"):
            write_report(given, tmp_path / "out")


def test_a_report_needs_no_jax_and_no_display(run_dir, tmp_path):
    code = (
        "import sys; from bigbatch.commands.report import write_report; "
        "assert 'matplotlib' not in sys.modules; write_report(sys.argv[1:2], sys.argv[2]); "
        "assert not {'jax', 'matplotlib.pyplot', 'tkinter'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, run_dir, tmp_path / "out"], check=True)
