"""A run's directory and data in a bucket, which forgets answers and is slow at times."""

import asyncio
import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import types
from concurrent import futures

import jax
import numpy as np
import pytest

from bigbatch import cli, places
from bigbatch.data import sets, token_files, tokens
from bigbatch.errors import RunError, UserError
from bigbatch.places.paths import is_bucket, place
from bigbatch.places.replacing import replacing
from bigbatch.workdir import metrics, storage, trackers
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.event_files import EventFiles
from bigbatch.workdir.files import Workdir
from tests import bucket as buckets_here
from tests import bucket_storm
from tests.test_checkpoint import save, state_of
from tests.test_distributed import ROOT
from tests.test_event_files import scalars

WHERE = f"gs://{buckets_here.NAME}"


@pytest.fixture(scope="module")
def shared():
    pytest.importorskip("gcsfs")
    with buckets_here.Bucket() as bucket, buckets_here.here(bucket):
        yield bucket


@pytest.fixture
def bucket(shared, monkeypatch):
    """Without faults, and empty. What is tried again comes soon."""
    quick = types.SimpleNamespace(sleep=lambda wait_s: asyncio.sleep(wait_s / 50))
    monkeypatch.setattr("gcsfs.retry.asyncio", quick)
    yield shared
    shared.rate, shared.force = 0.0, lambda method, path: None
    shared.counts.clear()
    for name in shared.names():
        shared.ask("DELETE", f"/storage/v1/b/{buckets_here.NAME}/o/{buckets_here.quoted(name)}")


def once(kind, match=lambda method, path: True):
    """Meets the first request that fits."""
    left = [kind]
    return lambda method, path: left.pop() if left and match(method, path) else None


def uploads(method, path):
    return "/upload/" in path


def lists(method, path):
    return method == "GET" and path.split("?")[0].endswith("/o")


def test_the_emulator_refuses_a_second_creation_and_a_stale_replacement(bucket):
    from bigbatch.places import buckets

    path = place(f"{WHERE}/a/claim")
    first = buckets.put_if(path, b"one")
    assert first is not None
    assert buckets.put_if(path, b"two") is None
    assert bucket.read("a/claim") == b"one"
    second = buckets.put_if(path, b"two", first)
    assert second not in (None, first)
    assert buckets.put_if(path, b"three", first) is None
    assert bucket.read("a/claim") == b"two"


@pytest.mark.parametrize("fault", ["unavailable", "lost", "stalled", "cut", "slow"])
def test_a_write_that_meets_a_fault_is_done_once(bucket, fault):
    from bigbatch.places import buckets

    bucket.force = once(fault, uploads)
    path = place(f"{WHERE}/a/claim")
    assert buckets.put_if(path, b"mine") is not None
    assert buckets.put_if(path, b"another's") is None
    assert bucket.read("a/claim") == b"mine"
    bucket.force = once(fault, uploads)
    with replacing(path) as file:
        file.write(b"x" * 2**20)
    assert bucket.read("a/claim") == b"x" * 2**20
    assert bucket.counts[fault] == 2


def test_what_fails_on_the_way_is_not_written(bucket):
    path = place(f"{WHERE}/a/file")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", None])
    assert bucket.names() == []


def test_a_refusal_is_an_error_that_names_the_object(bucket):
    path = place(f"{WHERE}/a/file")
    bucket.force = lambda method, path: 403
    for act in (path.exists, path.is_dir, path.is_file, path.read_bytes):
        with pytest.raises(PermissionError, match=r"permission denied.*'gs://tests/a/file'"):
            act()


def log_of(path, seed, kills):
    """Writes 60 records with kills in between, each of which takes back what is not saved."""
    draws, saved, done = random.Random(seed), 0, 0
    left = sorted(draws.sample(range(5, 60), kills), reverse=True)
    while done < 60:
        metrics.truncate(path, last_update=saved, without_test=saved % 7 == 0)
        done = saved
        log = metrics.MetricsLog(path)
        if done and done % 7 == 0:
            log.write({"update": done, "test_loss": 2 / done})
        while done < 60:
            done += 1
            log.write({"update": done, "train_loss": 1 / done})
            if done % 7 == 0:
                log.write({"update": done, "test_loss": 2 / done})
            if done % 4 == 0:
                log.sync()
                saved = done if draws.random() < 0.8 else saved
            if left and done >= left[-1]:
                left.pop()
                if not is_bucket(path):
                    log._file.close()
                break
        else:
            with log:
                log.sync()
    with storage.opened(path) as file:
        return file.read()


@pytest.mark.parametrize("seed", range(2))
def test_a_log_in_parts_is_the_log_of_a_disk(bucket, tmp_path, seed):
    bucket.force = lambda m, p: "lost" if random.random() < 0.02 else "stale"
    updates = sorted([*range(1, 61), *range(7, 61, 7)])
    found = log_of(place(f"{WHERE}/a/metrics.jsonl"), seed, 6)
    assert found == log_of(tmp_path / "metrics.jsonl", seed, 6)
    assert [json.loads(line)["update"] for line in found.splitlines()] == updates
    assert len(bucket.names("a/metrics.jsonl/")) > 3
    assert bucket.counts["stale"] > 0


def test_a_part_that_another_process_has_written_ends_the_run(bucket):
    path = place(f"{WHERE}/a/metrics.jsonl")
    log = metrics.MetricsLog(path)
    log.write({"update": 1})
    bucket.write("a/metrics.jsonl/00000000", b'{"update": 2}\n')
    with pytest.raises(RunError, match="another process has written it"):
        log.sync()
    assert bucket.read("a/metrics.jsonl/00000000") == b'{"update": 2}\n'


def test_tensorboard_reads_the_parts(bucket, tmp_path):
    options = {"config": {"seed": 1}, "metrics": ["test_loss"]}
    for first in (0, 4):
        events = EventFiles(place(f"{WHERE}/a/tensorboard"), last_update=first, **options)
        for update in range(first + 1, 7):
            events.write({"update": update, "train_loss": float(update + first)})
            events.sync()
        events.close()
    names = bucket.names("a/tensorboard/")
    for name in names:
        (tmp_path / name.rpartition("/")[2]).write_bytes(bucket.read(name))
    assert len(names) == 10
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 9.0), (6, 10.0)]
    assert scalars(tmp_path)["train/loss"] == expected


@pytest.fixture
def quick(monkeypatch):
    from bigbatch.places import buckets

    monkeypatch.setattr(buckets, "LEASE_S", 2.0)


def test_a_lease_is_kept_by_who_renews_it_and_lost_by_who_does_not(bucket, quick, capfd):
    files = Workdir.at(f"{WHERE}/a")
    assert files.claim()
    assert not files.claim()
    # Another host's start sees the renewals, and is refused.
    lease = storage._locks.pop(str(files.lock))[1]
    with pytest.raises(UserError, match=r"nobody else trains in; process \d+ on .*, since 20"):
        files.claim()
    # It sees none any more, and nothing tells whether that process lives.
    lease.close()
    lease._thread.join()
    bucket.write("a/lock", json.dumps({"who": "process 1 on there", "life": ["x", "y"]}).encode())
    assert files.claim()
    assert (
        "process 1 on there may still train in gs://tests/a; waiting up to 2 s"
        in capfd.readouterr().err
    )
    storage.release(files.lock)
    assert bucket.names() == []


def test_who_has_lost_its_lease_writes_no_more(bucket, quick):
    files = Workdir.at(f"{WHERE}/a")
    files.claim()
    bucket.write("a/lock", b"{}")
    storage._locks[str(files.lock)][1]._thread.join()
    with pytest.raises(RunError, match="another process has taken over gs://tests/a/lock"):
        storage.put(files.config, "{}")
    storage.release(files.lock)
    assert bucket.names() == ["a/lock"]


def test_of_many_who_find_an_old_lease_one_takes_it(bucket):
    from bigbatch.places import buckets

    bucket.write("a/lock", b"{}")
    path = place(f"{WHERE}/a/lock")
    old = buckets.look(path).generation
    with futures.ThreadPoolExecutor() as pool:
        taken = list(pool.map(lambda who: buckets.put_if(path, who, old), (b"1", b"2", b"3", b"4")))
    (winner,) = [i for i, generation in enumerate(taken, 1) if generation is not None]
    assert bucket.read("a/lock") == b"%d" % winner


HOLDER = """
import sys, time
from bigbatch.places.paths import place
from bigbatch.workdir import storage
storage.hold(place(sys.argv[1]), "workdir")
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_on_this_host_is_not_waited_for(bucket):
    lock = place(f"{WHERE}/a/lock")
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], **options) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    # Else it would take longer than a lease lasts.
    timer = threading.Timer(20, lambda: bucket.write("a/lock", b"{}"))
    timer.start()
    assert storage.hold(lock, "workdir")
    timer.cancel()
    storage.release(lock)


def restored(directory, warnings):
    with Checkpoints(directory, 2) as checkpoints:
        return checkpoints.restore(state_of(0), "this", warnings.append)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_in_a_bucket(bucket, tmp_path):
    directory = place(f"{WHERE}/a/checkpoints")
    bucket.rate = 0.02
    save(directory, 1, 2, 3)
    bucket.rate = 0.0
    # One that a kill left unfinished is none.
    for name in bucket.names("a/checkpoints/3/"):
        if not name.endswith("3/commit_success.txt"):
            bucket.write(name.replace("/3/", "/4/"), bucket.read(name))
    (data,) = [name for name in bucket.names("a/checkpoints/3/") if name.endswith("/c/0")]
    bucket.write(data, bucket.read(data)[::-1])
    warnings = []
    found = restored(directory, warnings)
    assert found.updates == 2
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(2))
    assert warnings == [f"damaged: {directory}/3; using {directory}/2 instead"]
    steps = {name.split("/")[2] for name in bucket.names("a/checkpoints/")}
    assert steps == {"2"}
    assert {name.split("/")[2] for name in bucket.names("a/damaged-checkpoints/")} == {"3-0"}
    save(directory, 3)
    # A copy on a disk is read.
    for name in bucket.names("a/checkpoints/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bucket.read(name))
    assert restored(tmp_path / "a/checkpoints", warnings).updates == 3
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.saved() == [3, 2]
        checkpoints.go_back(2)
    assert restored(directory, warnings).updates == 2
    assert {name.split("/")[2] for name in bucket.names("a/later-checkpoints/")} == {"3-0"}
    gc.collect()


def test_a_directory_that_an_old_list_hides_is_found(bucket):
    path = place(f"{WHERE}/a/directory")
    assert not path.exists()
    bucket.write("a/directory/file", b"x")
    bucket.force = once("stale", lists)
    assert path.exists()
    assert bucket.counts["stale"] == 1


def test_a_checkpoint_that_an_old_list_hides_is_saved_again(bucket):
    directory = place(f"{WHERE}/a/checkpoints")
    save(directory, 1)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.saved() == [1]
        save(directory, 2)
    bucket.force = lambda method, path: "stale"
    with Checkpoints(directory, 2) as checkpoints:
        assert checkpoints.restore(state_of(0)).updates == 1
        bucket.force = lambda method, path: None
        checkpoints.save(2, state_of(2), {"run": "this"})
    found = restored(directory, [])
    assert found.updates == 2
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(2))


TRAIN = ["train", f"--config={ROOT / 'configs/digits.py'}:increase", "--compilation-cache=off"]


def no_such(method, path):
    return 404 if f"/b/{buckets_here.NAME}" in path else None


def read_only(method, path):
    return 403 if method == "POST" else None


COPY = ("config.json", "plan.json", "metrics.jsonl")
BAD = [
    ("gs:/tests/a", None, (), r"gs://BUCKET/NAME/"),
    ("s3://tests/a", None, (), r"a path on this machine, or gs://BUCKET"),
    ("GS://tests/a", None, (), r"a path on this machine, or gs://BUCKET"),
    ("gs://tests/a b", None, (), r"without spaces"),
    (f"{WHERE}/a", no_such, (), r"bucket that is there and can be read \(there is no such bucket"),
    (f"{WHERE}/a", lambda *_: 401, (), r"\(no credentials were found, or these are not taken"),
    (f"{WHERE}/a", lambda *_: 403, (), r"a bucket that is there and can be read \(permission den"),
    (f"{WHERE}/a", read_only, (), r"a directory that can be written \(permission denied"),
    (f"{WHERE}/a", None, ("plan.json",), r"this one holds 'plan.json' and no config.json"),
    (f"{WHERE}/a", None, COPY, r"this is a copy from a disk, half of which would be of the bucket"),
]


@pytest.mark.parametrize(("workdir", "force", "held", "words"), BAD)
def test_a_directory_that_cannot_be_used_is_one_sentence(
    bucket, capfd, workdir, force, held, words
):
    for name in held:
        bucket.write(f"a/{name}", b"{}")
    bucket.force = force or bucket.force
    assert cli.main([*TRAIN, f"--workdir={workdir}"]) == 2
    error = capfd.readouterr().err
    assert "bigbatch: 1 mistake\n  workdir: given" in error
    assert len(error.splitlines()) <= 3

    assert re.search(words, error), error
    bucket.force = lambda *_: None
    assert bucket.names() == sorted(f"a/{name}" for name in held)


def test_a_tracker_that_needs_a_disk_is_refused(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match=r"trackers: given 'wandb'; allowed: .* that need no disk"):
        trackers.expect(["tensorboard", "wandb"], Workdir.at(f"{WHERE}/a"))


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.delattr(places, "buckets", raising=False)
    monkeypatch.setitem(sys.modules, "bigbatch.places.buckets", None)
    with pytest.raises(UserError, match=r"buckets need pip install 'bigbatch\[gcs\]'"):
        Workdir.at(f"{WHERE}/a")


def test_a_log_copied_from_a_bucket_is_not_gone_on_with_on_a_disk(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "metrics.jsonl/00000000").write_bytes(b'{"update": 1}\n')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a copy from a bucket, half of which would be of the disk"):
        Workdir(tmp_path).claim()
    storage.release(tmp_path / "lock")
    with storage.opened(tmp_path / "metrics.jsonl") as log:
        assert log.read() == b'{"update": 1}\n'


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_what_only_reads_says_that_there_is_no_bucket(bucket, capfd, tmp_path, verb):
    bucket.force = no_such
    where = f"{WHERE}/a"
    flags = [where, f"--out={tmp_path}"] if verb == "report" else [f"--workdir={where}"]
    assert cli.main([verb, *flags]) == 2
    assert "there is no such bucket or object" in capfd.readouterr().err


def copied(bucket, directory, name):
    """Copies a directory into the bucket; its place there."""
    for path in directory.rglob("*"):
        if path.is_file():
            bucket.write(f"{name}/{path.relative_to(directory)}", path.read_bytes())
    return f"{WHERE}/{name}"


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_records_in_a_bucket_are_those_of_the_disk(
    bucket, imagenet, tmp_path, monkeypatch, file_format
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = imagenet.directories[file_format]
    options = {"name": "imagenet2012", "image_size": 8, "train_examples": 36, "test_examples": 11}
    there = copied(bucket, here, "data")
    bucket.rate = 0.01
    found = [sets.Options(directory=where, **options).load() for where in (there, here)]
    for shown in ("training", "evaluation"):
        asked = (3, 5, 60) if shown == "training" else (0, 11)
        ours, expected = (getattr(data, shown)(*asked) for data in found)
        for name, values in expected.items():
            np.testing.assert_array_equal(ours[name], values)
    assert found[0].description == found[1].description
    if file_format == "tfrecord":
        assert len(list(tmp_path.rglob("*.bigbatch_index.npz"))) == 2
    assert not [name for name in bucket.names("data/") if "bigbatch" in name]
    for data in found:
        data.train.close()
        data.test.close()


@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_tokens_in_a_bucket_are_those_of_the_disk(bucket, tmp_path, monkeypatch, documents):
    (tmp_path / "text").write_text("in the beginning\n" * 50)
    token_files.prepare(tmp_path / "tokens", [str(tmp_path / "text")])
    there = copied(bucket, tmp_path / "tokens", "tokens")
    numbers = np.array([5, 0, 12, 5])
    (expected,) = (part.read(numbers) for part in parts_of(tmp_path / "tokens", documents))
    for small in (True, False):
        monkeypatch.setattr(tokens, "_READ_WHOLE_BYTES", 2**20 if small else 0)
        (part,) = parts_of(there, documents)
        for name, values in expected.items():
            np.testing.assert_array_equal(part.read(numbers)[name], values)
        np.testing.assert_array_equal(part.tokens[3:9], list(b"the be"))


def parts_of(directory, documents):
    options = {"name": tokens.NAMES[-1], "sequence_tokens": 7, "documents": documents}
    return tokens.TokenOptions(directory=str(directory), **options).parts.values()


def test_arrays_in_a_bucket_are_those_of_the_disk(bucket, tmp_path):
    (tmp_path / "digits.npz").write_bytes(bucket_storm.data())
    bucket.write("digits.npz", bucket_storm.data())
    options = [{"path": f"{WHERE}/digits.npz"}, {"path": str(tmp_path / "digits.npz")}]
    ours, expected = (sets.Options(name="arrays", **option).load() for option in options)
    assert ours.description == expected.description
    assert ours.train_examples == 1437


def test_data_that_is_not_there_is_one_sentence(bucket, capfd):
    data = ["--config.data.name=cifar10", f"--config.data.directory={WHERE}/none"]
    assert cli.main([*TRAIN, *data, "--workdir=/dev/null/x"]) == 2
    assert f"nothing is in {WHERE}/none/cifar10" in capfd.readouterr().err
    bucket.force = no_such
    assert cli.main([*TRAIN, *data, "--workdir=/dev/null/x"]) == 2
    assert "data.directory: given" in (error := capfd.readouterr().err)
    assert "there is no such bucket" in error
    assert cli.main(["data", "prepare", "mnist", f"--directory={WHERE}/none"]) == 2
    assert "gcloud storage cp --recursive" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_20_times_is_that_of_the_disk(processes):
    bucket_storm.storm(20, processes, 0, 0.03, 15)


@pytest.mark.long
def test_processes_of_a_disk_and_of_a_bucket_are_refused(bucket, tmp_path):
    commands = [[sys.executable, "-m", "bigbatch", *TRAIN] for _ in range(2)]
    for command, workdir in zip(commands, (f"{WHERE}/a", tmp_path / "a"), strict=True):
        command.append(f"--workdir={workdir}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = bucket_storm.started(commands, environment)
    said = bucket_storm.ended(running)
    assert [process.returncode for process in running] == [2, 2]
    assert "workdir: given 'process 1: \"no bucket\"'; allowed: one value for all" in said
    assert bucket.names() == []
    assert not (tmp_path / "a").exists()
