"""What TensorBoard's own reader finds in a run's directory, beside the log's lines."""

import contextlib
import json
import warnings

import pytest

from bigbatch.workdir import event_files
from bigbatch.workdir.event_files import EventFiles
from bigbatch.workdir.metrics import MetricsLog, truncate
from tests import trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata


def reader(path):
    found = EventAccumulator(str(path), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(path):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    found = reader(path)
    return {t: [(e.step, e.value) for e in found.Scalars(t)] for t in found.Tags()["scalars"]}


TAGS = {
    "examples": "progress/examples",
    "epoch": "progress/epoch",
    "batch_size": "schedule/batch_size",
    "learning_rate": "schedule/learning_rate",
    "momentum": "schedule/momentum",
    "noise_scale": "schedule/noise_scale",
    "train_loss": "train/loss",
    "examples_per_s": "train/examples_per_s",
    "input_wait_s": "input/wait_s",
    "test_loss": "eval/loss",
    "test_accuracy": "eval/accuracy",
}


def expected(records):
    """The same from records; TensorBoard holds float32."""
    tags = {}
    for record in records:
        for name, value in record.items():
            if name not in ("update", "unix_s") and value is not None:
                points = tags.setdefault(TAGS[name], [])
                points.append((record["update"], pytest.approx(value, rel=1e-6)))
    return tags


def record(update, **fields):
    return {"update": update, "examples": 100 * update + 2**33, "train_loss": 1 / update, **fields}


def test_the_files_hold_the_log_after_kills_and_resumes(tmp_path):
    log_path, events = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    killed = contextlib.ExitStack()
    for last_update, updates in ((0, range(1, 8)), (4, range(5, 7)), (0, [1]), (1, range(2, 10))):
        truncate(log_path, last_update=last_update)
        files = EventFiles(
            events,
            last_update=last_update,
            config={},
            metrics=(),
        )
        # Not closed, as after a kill that comes after a checkpoint.
        log = killed.enter_context(MetricsLog(log_path, [files]))
        for update in updates:
            log.write(record(update, noise_scale=None, learning_rate=0.1 * last_update))
        log.sync()
    records = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [row["update"] for row in records] == list(range(1, 10))
    assert scalars(events) == expected(records)
    killed.close()


def test_a_run_can_be_opened_in_tensorboard(tmp_path):
    config = trained.quick(epochs=0.1, checkpoint_every_updates=2)
    trained.train(trained.prepared(config), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("test_accuracy" in row for row in records)
    assert scalars(tmp_path / "tensorboard") == expected(records)
    found = reader(tmp_path / "tensorboard")
    summary = found.SummaryMetadata(metadata.EXPERIMENT_TAG)
    columns = metadata.parse_experiment_plugin_data(summary.plugin_data.content).metric_infos
    # Each is the name of a scalar.
    names = {column.name.tag for column in columns}
    assert names == {"eval/loss", "eval/accuracy", "train/loss"} < set(found.Tags()["scalars"])
    summary = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    shown = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content).hparams
    assert shown["policy.learning_rate"].number_value == 0.1
    assert shown["model.name"].string_value == "wide_resnet"
    assert json.loads(shown["policy.boundaries_epochs"].string_value) == [0.2, 0.5]
    assert shown["transformations.0.name"].string_value == "grow_batch"
    assert shown["transformations.0.max_batch_size"].number_value == 160
    (text,) = found.Tensors("config/text_summary")
    assert '"boundaries_epochs": [' in text.tensor_proto.string_val[0].decode()


def test_records_reach_the_files_in_groups_or_after_a_while(tmp_path, monkeypatch):
    def shown():
        return [step for step, _ in scalars(tmp_path).get("train/loss", [])]

    now_s = 1_000.0
    monkeypatch.setattr(event_files.time, "monotonic", lambda: now_s)
    files = EventFiles(tmp_path, last_update=0, config={}, metrics=())
    for update in range(1, 128):
        files.write(record(update))
    assert shown() == []
    files.write(record(128))
    assert shown() == list(range(1, 129))
    files.write(record(129))
    assert shown() == list(range(1, 129))
    now_s += 11
    files.write(record(130))
    assert shown() == list(range(1, 131))
    files.write(record(131))
    files.sync()
    assert shown() == list(range(1, 132))
    files.write(record(132))
    files.close()
    assert shown() == list(range(1, 133))
