"""Checkpoints: whatever happens to their files, what is used is whole or there is a word."""

import contextlib
import gc
import json
import os
import resource
import shutil
import sys
import threading
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch import distributed
from bigbatch.engine.functions import State, data_mesh, shardings
from bigbatch.engine.parts import Layers, Parts, Shard
from bigbatch.errors import RunError, UserError
from bigbatch.workdir import checkpoint, orbax_options
from bigbatch.workdir.checkpoint import FORMAT, Checkpoints


def state_of(seed: int) -> State:
    key = jax.random.key(seed)
    params = {"a": jax.random.normal(key, (60, 50)), "b": jax.random.normal(key, (7,))}
    return State(params, {"m": jnp.zeros(3)}, {"count": jnp.int32(seed)})


def save(directory: Path, *numbers: int, run: str = "this", **options) -> None:
    with Checkpoints(directory, 2, **options) as checkpoints:
        for updates in numbers:
            checkpoints.save(updates, state_of(updates), {"run": run})


def restored(directory: Path, warnings: list[str] | None = None, run: str = "this"):
    with Checkpoints(directory, 2) as checkpoints:
        return checkpoints.restore(state_of(0), run, (warnings or []).append)


def numbers_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original") / "checkpoints"
    save(directory, 1, 2)
    return directory


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


# Orbax drops coroutines and calls a closed loop when it fails to read.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_is_cut_changed_or_missing_gives_the_checkpoint_before(original, tmp_path):
    files = [path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file()]
    assert len(files) == 6
    used = []
    for damage in (cut, flip, os.remove):
        for name in files:
            shutil.rmtree(tmp_path)
            directory = tmp_path / "checkpoints"
            shutil.copytree(original, directory)
            damage(directory / name)
            warnings = [""]
            found = restored(directory, warnings)
            jax.tree.map(np.testing.assert_array_equal, found.state, state_of(found.updates))
            used.append(found.updates)
            aside = tmp_path / "damaged-checkpoints"
            if found.updates == 1:
                assert str(directory / "1") in warnings[1]
                assert str(directory / "2") in warnings[1]
                assert [path.name for path in aside.iterdir()] == ["2-0"]
                assert numbers_in(directory) == [1]
            else:
                # A file that is not needed to read what was saved.
                assert warnings == [""]
                assert not aside.exists()
    # Each kind of damage to the data, its index and the record is among those that were noticed.
    assert used.count(1) >= 9
    gc.collect()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_all_are_damaged_nothing_is_changed(original, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    for number in ("1", "2"):
        (directory / number / "state" / "_METADATA").unlink()
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged \(updates 2, 1\)"):
        restored(directory)
    assert numbers_in(directory) == [1, 2]
    gc.collect()


def test_processes_that_see_other_checkpoints_are_told(original, monkeypatch):
    """As where a workdir is on the disk of one host."""
    other = json.dumps({"checkpoints": [1]}).encode()
    monkeypatch.setattr(distributed, "gather", lambda facts: [facts, other])
    with pytest.raises(UserError, match=r"checkpoints: given 'process 1: \[1\]'"):
        restored(original)


def test_a_checkpoint_of_another_run_is_refused(original, tmp_path):
    with pytest.raises(UserError, match="this one is of another"):
        restored(original, run="another")
    assert numbers_in(original) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, rf"format {FORMAT}; this one has {FORMAT + 1}"),
        ({"format": FORMAT - 1}, rf"format {FORMAT}; this one has {FORMAT - 1}"),
        ({"project": "another"}, "this one is of something else"),
    ],
)
def test_what_another_version_or_project_wrote_is_refused(original, tmp_path, change, message):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    path = directory / "2" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    record = content["custom_metadata"] | change
    del record["digest"]
    content["custom_metadata"] = record | {"digest": checkpoint._digest(record)}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        restored(directory)
    assert numbers_in(directory) == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"custom_metadata": {"project": "another"}},
        {"custom_metadata": {"format": "5"}},
        {"custom_metadata": {"arrays": {}}},
        {"custom_metadata": None},
    ],
)
def test_a_record_that_was_changed_gives_the_checkpoint_before(original, tmp_path, change):
    directory, warnings = tmp_path / "checkpoints", []
    shutil.copytree(original, directory)
    path = directory / "2" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    found = restored(directory, warnings)
    assert found.updates == 1
    np.testing.assert_array_equal(found.state.params["a"], state_of(1).params["a"])


def test_what_is_put_aside_is_no_checkpoint_any_more(original, tmp_path):
    """Of three the newest two are kept, and the damaged one is none of them."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    cut(directory / "2" / "state" / "_METADATA")
    with Checkpoints(directory, 2) as checkpoints:
        assert checkpoints.restore(state_of(0), "this", print).updates == 1
        checkpoints.save(3, state_of(3), {"run": "this"})
    assert numbers_in(directory) == [1, 3]


@pytest.mark.parametrize("change", [{"metrics": 7}, {"init_timestamp_nsecs": "yesterday"}])
def test_a_record_that_orbax_cannot_read_is_said(original, tmp_path, change):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    path = directory / "2" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="a directory of checkpoints that can be read"):
        restored(directory)


def test_going_back_moves_what_came_after(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, 1, 2)
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match=r"from-update: given 3; nearest: 2; allowed: .*: 2, 1"):
            checkpoints.go_back(3)
        checkpoints.go_back(1)
    assert restored(directory).updates == 1
    save(directory, 2)
    with Checkpoints(directory) as checkpoints:
        checkpoints.go_back(1)
    later = {path.name for path in (tmp_path / "later-checkpoints").iterdir()}
    assert later == {"2-0", "2-1"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: it went"), jax.errors.JaxRuntimeError),
        (OSError(), RunError),
    ],
)
def test_a_process_that_went_is_no_fault_of_the_file_system(tmp_path, monkeypatch, error, kind):
    def failing(*_, **__):
        raise error

    with Checkpoints(tmp_path, 2) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", failing)
        with pytest.raises(kind):
            checkpoints.save(1, state_of(1), {"run": "this"})


def test_an_error_waits_for_what_is_being_written(tmp_path):
    directory = tmp_path / "checkpoints"
    with contextlib.suppress(ZeroDivisionError), Checkpoints(directory, 2) as checkpoints:
        checkpoints.save(1, state_of(1), {"run": "this"})
        raise ZeroDivisionError
    assert numbers_in(directory) == [1]
    assert restored(directory).updates == 1


def test_a_half_written_checkpoint_is_none(original, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    (directory / "2").rename(directory / "3.orbax-checkpoint-tmp")
    assert restored(directory).updates == 1
    save(directory, 2)
    assert numbers_in(directory) == [1, 2]


def test_a_full_folder_ends_the_run_with_a_word_and_keeps_what_is_there(original, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this: writing fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(RunError, match=f"could not be written to {directory}"):
            save(directory, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert restored(directory).updates == 2
    assert "Traceback" not in caplog.text


def test_the_newest_stay_and_those_that_are_kept_for_good(tmp_path):
    save(tmp_path / "c", *range(1, 8), keep_always=lambda updates: updates % 3 == 0)
    assert numbers_in(tmp_path / "c") == [3, 6, 7]


@pytest.mark.parametrize("piece_bytes", [1, 3, 100, 2**25])
def test_a_state_in_any_number_of_pieces_comes_back(tmp_path, monkeypatch, piece_bytes):
    small = State({"a": jnp.arange(5, dtype=jnp.bfloat16)}, {"m": jnp.zeros((0, 3))}, jnp.int32(7))
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece_bytes)
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        checkpoints.save(1, small, {"run": "this"})
    with Checkpoints(tmp_path / "c") as checkpoints:
        _, record = checkpoints.latest()
        found = checkpoints.restore(small).state
    jax.tree.map(np.testing.assert_array_equal, found, small)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (found, small)]
    assert kinds[0] == kinds[1]
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(small))
    assert record["checksum"] == zlib.crc32(content)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_in_parts_comes_back_wherever_it_is_to_lie(tmp_path):
    values = State(
        {
            "a": jax.random.normal(jax.random.key(0), (16, 3)),
            "b": jnp.arange(8, dtype=jnp.bfloat16),
        },
        {"m": jnp.zeros((0, 3)), "is": jnp.arange(4) > 1},
        jnp.int32(7),
    )

    def lying(devices: int, shard: Shard) -> State:
        parts = Parts(data_mesh(jax.devices()[:devices]), shard)
        return jax.device_put(values, shardings(values, parts))

    def read(like: State, warnings: list[str]):
        with Checkpoints(tmp_path / "c", 2) as checkpoints:
            return checkpoints.restore(like, warn=warnings.append)

    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        for updates in (1, 2):
            checkpoints.save(updates, lying(8, "update"), {"run": "this"})
    others = lying(8, Layers(4, 2)), lying(2, "none")
    for like in (lying(8, "update"), lying(4, "update"), *others):
        found = read(like, [])
        assert found.updates == 2
        jax.tree.map(np.testing.assert_array_equal, found.state, values)
        assert found.state.params["a"].sharding == like.params["a"].sharding
    first = tmp_path / "c" / "2" / "state" / "000000" / "c"
    data = [path for path in first.rglob("*") if path.is_file()]
    # One for each device's part.
    assert len(data) == 8
    flip(data[5])
    warnings: list[str] = []
    assert read(lying(4, "update"), warnings).updates == 1
    assert len(warnings) == 1


def test_many_checkpoints_keep_no_descriptor_and_no_thread(tmp_path):
    """One of each a save would be 40; the save that is under way has a dozen."""

    def counts() -> np.ndarray:
        return np.array([len(os.listdir("/dev/fd")), threading.active_count()])

    save(tmp_path / "first", 1)
    before = counts()
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        for updates in range(1, 41):
            checkpoints.save(updates, state_of(updates), {"run": "this"})
        during = counts()
    assert np.all(during - before < 30)
    assert np.all(counts() - before < 10)


@pytest.mark.parametrize("name", ["lr=[0.1]", "[ab]*?", "a\nb #%é", "~", "-x", "x" * 250])
def test_a_checkpoint_in_a_directory_of_any_name_comes_back(tmp_path, name):
    save(tmp_path / name / "c", 1, 2)
    assert restored(tmp_path / name / "c").updates == 2


def test_a_state_of_another_shape_is_not_used(original):
    # Another number of bytes, and as many: another dtype, shape and name.
    for name, array in (
        ("b", jnp.zeros(8)),
        ("b", jnp.zeros(7, jnp.int32)),
        ("b", jnp.zeros((7, 1))),
        ("c", jnp.zeros(7)),
    ):
        other = state_of(0)
        del other.params["b"]
        other.params[name] = array
        with Checkpoints(original) as checkpoints, pytest.raises(RunError, match="are damaged"):
            checkpoints.restore(other)


def test_only_what_orbax_leaves_of_its_loop_is_not_told(monkeypatch):
    """Python has remarks on errors that nobody can catch."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    # Tests before this one have called it.
    orbax_options.say_nothing_twice.__wrapped__()
    for words in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(words)))
    assert [str(each.exc_value) for each in told] == ["another"]
