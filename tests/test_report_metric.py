"""Reports on runs of any task: a language model, a regression, no test data, and mixtures."""

import json
import math
import statistics

import pytest
import scipy.stats

from bigbatch.commands.report import read_run, summarise, write_report
from bigbatch.commands.report.figures import metric_limits, panels
from bigbatch.commands.report.interactive import page_data
from bigbatch.commands.report.page import page
from bigbatch.commands.report.table import claims, columns, markdown, table
from tests.report_runs import DECAY, falling_loss, write_run

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
INCREASE = [(2, 20, 0.1), (2, 100, 0.1)]
PERPLEXITY = {"decay": [40.0, 42.0, 44.0], "increase": [41.0, 44.0, 50.0]}


def summary_of(paths):
    return summarise([read_run(path) for path in paths])


def rows_of(summary):
    """{experiment: {column: text}}."""
    head = columns(summary)
    return {row[0]: dict(zip(head, row, strict=True)) for row in table(summary)}


def charts_of(summary):
    return {chart["id"]: chart for chart in page_data(summary)["charts"]}


def one_run(root, name, **fields):
    return write_run(root, name, 0, DECAY, falling_loss(0, epochs=4), **fields)


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """Perplexities that halve from epoch to epoch, down to `PERPLEXITY` after the fourth."""
    root = tmp_path_factory.mktemp("language_models")
    made = []
    for name, stages in {"decay": DECAY, "increase": INCREASE}.items():
        for seed, last in enumerate(PERPLEXITY[name]):
            metrics = {
                "perplexity": lambda epoch, last=last: last * 2 ** (4 - epoch),
                "token_accuracy": lambda epoch, seed=seed: 0.3 + 0.01 * seed,
            }
            loss = falling_loss(seed + len(made), epochs=4)
            made.append(write_run(root, name, seed, stages, loss, metrics=metrics))
    return made


def test_a_language_model_is_reported_by_its_perplexity(language_models, tmp_path):
    report = write_report(language_models, tmp_path / "out")
    assert report.warnings == ()
    assert [path.name for path in report.figures][-1] == "test_perplexity.png"
    summary = report.summary
    assert columns(summary)[3:6] == ("fewer updates", "test perplexity", "test token_accuracy, %")
    rows = rows_of(summary)
    # Two digits of the standard deviations, 2 and 4.58.
    assert rows["decay"]["test perplexity"] == "42.0 ± 2.0"
    assert rows["increase"]["test perplexity"] == "45.0 ± 4.6"
    assert rows["decay"]["test token_accuracy, %"] == "31.00 ± 1.00"

    interval = scipy.stats.ttest_ind(
        PERPLEXITY["increase"], PERPLEXITY["decay"], equal_var=False
    ).confidence_interval(0.95)
    half_width = (interval.high - interval.low) / 2
    claim = f"test perplexity difference +3.0 ± {half_width:.1f} (n = 3 + 3)"
    assert claim in dict(claims(summary))["increase"]

    text = report.page.read_text()
    assert "<h2>Test perplexity at equal cost</h2>" in text
    # After 120 of its 200 updates decay was last evaluated at epoch 2: four times the last value.
    assert "<td>168.0 ± 8.0</td>" in text
    assert "A difference of test perplexity has Welch&#x27;s" in text
    assert "<td>finished</td><td>50.0</td><td>32.00</td>" in text
    assert "points" not in report.table.read_text()


def test_the_curve_of_a_metric_is_drawn_and_what_is_far_off_is_cut(language_models):
    summary = summary_of(language_models)
    chart = charts_of(summary)["metric"]
    assert chart["title"] == "Test perplexity"
    assert chart["series"][0]["y"] == [336, 168, 84, 42]
    grid = page_data(summary)["grids"][chart["series"][0]["grid"]]
    assert grid["updates"] == [50, 100, 150, 200]
    sd = statistics.stdev(PERPLEXITY["decay"])
    assert chart["series"][0]["high"] == pytest.approx([(42 + sd) * 2**i for i in (3, 2, 1, 0)])
    assert "The first evaluations may lie outside the figure." in page(summary)
    low, high = metric_limits(summary)
    # Sorted: 42, 45, 84, 90, 168, 180, 336, 360; four fifths lie below 180 + 0.6 x 156.
    margin = 0.15 * (273.6 - 42)
    assert (low, high) == pytest.approx((42 - margin, 273.6 + margin))


def test_the_lowest_are_cut_where_a_metric_rises_and_a_constant_has_room(tmp_path):
    rising = one_run(tmp_path, "rising", metrics={"bleu": lambda epoch: 10 * epoch})
    # 10, 20, 30, 40: a fifth lies below 16.
    assert metric_limits(summary_of([rising])) == pytest.approx((16 - 3.6, 40 + 3.6))
    constant = one_run(tmp_path, "constant", metrics={"bleu": lambda epoch: 20.0})
    assert metric_limits(summary_of([constant])) == pytest.approx((20 - 3, 20 + 3))


def test_a_run_without_metrics_is_judged_by_its_test_loss(tmp_path):
    for name, value in {"decay": 0.00143, "other": 0.00123}.items():
        one_run(tmp_path, name, metrics={}, test_loss=lambda _, value=value: value)
    # The config of a run without a config file.
    path = tmp_path / "other" / "seed_0" / "config.json"
    path.write_text(json.dumps({"experiment": "other", "seed": 0, "ghost_batch_examples": 8}))
    summary = summary_of(sorted(tmp_path.glob("*/*")))
    assert "accuracy" not in markdown(summary) + page(summary)
    assert columns(summary)[4:6] == ("test loss", "training loss at the end")
    rows = rows_of(summary)
    assert (rows["decay"]["test loss"], rows["other"]["test loss"]) == ("0.00143", "0.00123")
    expected = f"test loss difference {MINUS}0.000200 (too few runs for an interval, n = 1 + 1)"
    assert expected in dict(claims(summary))["other"]
    assert charts_of(summary)["metric"]["title"] == "Test loss"
    assert "test_loss" in panels(summary)
    assert summary.config_differences["ghost_batch_examples"] == ("-", "8")


@pytest.mark.parametrize("result", [{}, {"test_loss": None}, {"test_loss": math.nan}])
def test_runs_without_test_data_are_shown_by_their_training_loss(tmp_path, result):
    for name in ("decay", "other"):
        path = one_run(tmp_path, name, metrics={"accuracy": lambda _: 0.9}, test_loss=None)
        written = json.loads((path / "result.json").read_text()) | result
        (path / "result.json").write_text(json.dumps(written))
    summary = summary_of(sorted(tmp_path.glob("*/*")))
    assert summary.warnings == ()
    assert columns(summary)[3:5] == ("fewer updates", "training loss at the end")
    assert list(panels(summary)) == ["growing_batch", "schedules"]
    assert not {"accuracy", "metric"} & set(charts_of(summary))
    assert claims(summary)[0][1].startswith("as many updates as decay (200); no curve gap")
    assert "test " not in markdown(summary)
    assert '<th scope="col">state</th></tr>' in page(summary)
    assert "at equal cost" not in page(summary)


def test_a_report_of_runs_without_test_data_is_written(tmp_path):
    path = one_run(tmp_path, "decay", metrics={}, test_loss=None)
    report = write_report([path], tmp_path / "out")
    assert [path.name for path in report.figures] == ["growing_batch.png", "schedules.png"]


def test_runs_with_and_without_test_data_go_together(tmp_path):
    one_run(tmp_path, "decay")
    one_run(tmp_path, "untested", metrics={}, test_loss=None)
    summary = summary_of(sorted(tmp_path.glob("*/*")))
    assert summary.warnings == ()
    rows = rows_of(summary)
    assert rows["decay"]["test accuracy, %"] == "90.00"
    assert rows["untested"]["test accuracy, %"] == MISSING
    assert "test accuracy unknown" in dict(claims(summary))["untested"]
    assert [series["experiment"] for series in charts_of(summary)["accuracy"]["series"]] == [0]


def test_runs_of_different_metrics_are_compared_by_one_that_all_have(tmp_path):
    accuracies = {"accuracy": lambda _: 0.9, "top5_accuracy": lambda _: 0.99}
    one_run(tmp_path, "decay", metrics=accuracies)
    one_run(tmp_path, "other", metrics={"top5_accuracy": lambda _: 0.98})
    summary = summary_of(sorted(tmp_path.glob("*/*")))
    assert summary.warnings == (
        "the runs' main metrics are accuracy, top5_accuracy: they are compared by the test "
        "top5_accuracy.",
    )
    assert columns(summary)[4:6] == ("test top5_accuracy, %", "test accuracy, %")
    assert rows_of(summary)["other"]["test accuracy, %"] == MISSING
    said = dict(claims(summary))["other"]
    assert f"test top5_accuracy difference {MINUS}1.00 points (too few runs" in said


def test_runs_that_have_no_metric_in_common_are_compared_by_their_test_loss(tmp_path):
    one_run(tmp_path, "decay", test_loss=lambda _: 0.25)
    one_run(tmp_path, "model", metrics={"perplexity": lambda _: 7.5}, test_loss=lambda _: 0.5)
    one_run(tmp_path, "plain", metrics={}, test_loss=lambda _: 1.0)
    summary = summary_of(sorted(tmp_path.glob("*/*")))
    assert summary.warnings == (
        "the runs' main metrics are accuracy, perplexity, loss: they are compared by the test "
        "loss.",
    )
    rows = rows_of(summary)
    heads = ("test loss", "test accuracy, %", "test perplexity")
    assert columns(summary)[4:7] == heads
    assert [rows["decay"][head] for head in heads] == ["0.250", "90.00", MISSING]
    assert [rows["model"][head] for head in heads] == ["0.500", MISSING, "7.50"]
    assert [rows["plain"][head] for head in heads] == ["1.00", MISSING, MISSING]
    assert "the runs&#x27; main metrics" in page(summary)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metrics": "perplexity"}'])
def test_a_damaged_description_is_named_and_the_test_loss_counts(tmp_path, text):
    path = one_run(tmp_path, "decay", metrics={"perplexity": lambda _: 7.5})
    (path / "run.json").write_text(text)
    run = read_run(path)
    assert run.warnings == ("run.json is damaged: the run is judged by its test loss",)
    assert run.metrics == ("loss",)
    assert rows_of(summarise([run]))["decay"]["test loss"] == "0.100"


def test_a_metric_that_an_evaluation_lacks_is_not_known_there(tmp_path):
    path = one_run(tmp_path, "decay", metrics={"perplexity": lambda _: 7.5}, finished=False)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    tested = [row for row in rows if "test_loss" in row]
    tested[1]["test_perplexity"] = None
    del tested[3]["test_perplexity"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summary_of([path])
    assert rows_of(summary)["decay"]["test perplexity"] == MISSING
    assert charts_of(summary)["metric"]["series"][0]["y"] == [7.5, None, 7.5, None]


def test_no_name_of_a_metric_breaks_the_page_or_leaves_the_directory(tmp_path):
    summary = summary_of([one_run(tmp_path, "decay", metrics={"../<b>|x": lambda _: 7.5})])
    assert list(panels(summary))[-1] == "test_____b__x"
    assert "test ../&lt;b&gt;|x" in page(summary)
    assert "<b>|x" not in page(summary)
    assert r"test ../\<b\>\|x" in markdown(summary)
