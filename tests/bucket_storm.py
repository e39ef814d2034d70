"""A digits run whose directory and data are in a bucket with faults, killed again and again.

    python -m tests.bucket_storm KILLS [PROCESSES [SEED [RATE [EPOCHS]]]]

It is compared with one that nobody has disturbed, on this machine's disk: the same bits, and the
same records, each once. Where the faults end it with a word, it is started again. Two processes are
killed one at a time, by turns; the other one ends then.
"""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests import bucket as buckets
from tests.storm import ROOT

CLOCKS = ("examples_per_s", "tokens_per_s", "input_wait_s", "unix_s")
# What is not reached in this time, on a machine at work, is reached no more.
PATIENCE_S = 600


def data() -> bytes:
    """The digits as a file of arrays."""
    with np.load(ROOT / "bigbatch/data/digits.npz") as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 0
    written = io.BytesIO()
    parts = {"train": ~test, "test": test}
    arrays = {f"{name}_images": images[of] for name, of in parts.items()}
    np.savez(written, **arrays, **{f"{n}_labels": labels[of] for n, of in parts.items()})
    return written.getvalue()


def command_for(workdir: str, path: str, epochs: int, cache: Path) -> list[str]:
    """The command of the run."""
    return [
        *(sys.executable, "-m", "bigbatch", "train"),
        f"--config={ROOT / 'configs/digits.py'}:increase",
        *("--config.data.name=arrays", f"--config.data.path={path}"),
        f"--config.epochs={epochs}",
        "--config.policy.boundaries_epochs=" + str((epochs // 3, epochs // 2, 4 * epochs // 5)),
        *("--config.checkpoint_every_updates=3", "--config.log_every_updates=1"),
        "--config.evaluate_every_updates=5",
        *(f"--workdir={workdir}", f"--compilation-cache={cache}"),
    ]


def records(log: bytes) -> list[dict]:
    """A log without what depends on the clock."""
    lines = [json.loads(line) for line in log.splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def started(commands: list[list[str]], environment: dict) -> list[subprocess.Popen]:
    """The processes of a run."""
    address, processes = f"127.0.0.1:{buckets.free_port()}", len(commands)
    made = []
    for process, command in enumerate(commands):
        flags = [f"--coordinator={address}", f"--num-processes={processes}", f"--process={process}"]
        own = [*command, *(flags if processes > 1 else ())]
        options = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
        made.append(subprocess.Popen(own, stdout=-1, stderr=subprocess.STDOUT, **options))
    return made


def ended(running: list[subprocess.Popen]) -> str:
    """What processes have said, when all have ended."""
    return "".join(process.communicate(timeout=PATIENCE_S)[0] for process in running)


def saved(bucket: buckets.Bucket) -> set[str]:
    """The checkpoints that are begun, and those that are whole."""
    return {
        name
        for name in bucket.names("run/checkpoints/")
        if name.endswith(("/commit_success.txt", "/_CHECKPOINT_METADATA"))
    }


def storm(kills: int, processes: int, seed: int, rate: float, epochs: int) -> None:
    """Prints what was done; fails if something was lost."""
    draws, killed, given_up = random.Random(seed), 0, list[str]()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        environment["XLA_FLAGS"] = ""
    with tempfile.TemporaryDirectory() as place, buckets.Bucket(rate, seed) as bucket:
        place, cache = Path(place), Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or place)
        (place / "digits.npz").write_bytes(data())
        bucket.write("data/digits.npz", data())
        command = command_for(str(place / "disk"), str(place / "digits.npz"), epochs, cache)
        said = ended(started([command] * processes, environment))
        assert (place / "disk/result.json").exists(), said
        environment |= bucket.environment
        where = f"gs://{buckets.NAME}"
        command = command_for(f"{where}/run", f"{where}/data/digits.npz", epochs, cache)
        while True:
            before, start_s = saved(bucket), time.monotonic()
            running = started([command] * processes, environment)
            new = draws.randrange(1, 8)
            while all(process.poll() is None for process in running):
                if killed < kills and len(saved(bucket) - before) >= new:
                    time.sleep(draws.uniform(0, 0.3))
                    running[killed % processes].send_signal(signal.SIGKILL)
                    killed += 1
                    break
                assert time.monotonic() < start_s + PATIENCE_S, "it goes on no more"
                time.sleep(0.02)
            said = ended(running)
            print(f"{killed} killed, {time.monotonic() - start_s:.0f} s, {dict(bucket.counts)}")
            sys.stdout.flush()
            if [process.returncode for process in running] == [0] * processes:
                break
            if all(process.returncode != -signal.SIGKILL for process in running):
                # What was tried again too often, or a list that Orbax believed.
                assert re.search("the same command continues|they continue", said), said
                given_up.append(said.strip().splitlines()[-1])
        result = json.loads(bucket.read("run/result.json"))
        disk = json.loads((place / "disk/result.json").read_text())
        parts = [bucket.read(name) for name in bucket.names("run/metrics.jsonl/")]
        log = records(b"".join(parts))
        assert log == records((place / "disk/metrics.jsonl").read_bytes())
        assert result["params_sha256"] == disk["params_sha256"]
        assert "run/lock" not in bucket.names("run/lock")
        print(
            f"{killed} kills of {processes} process(es): {result['params_sha256'][:16]} and "
            f"{len(log)} records in {len(parts)} parts as on the disk; {dict(bucket.counts)}",
            f"given up {len(given_up)} times",
            *given_up,
            sep="\n",
        )
        assert killed == kills, "it ended before; more epochs take more kills"


if __name__ == "__main__":
    given = sys.argv[1:]
    usual = ("20", "1", "0", "0.03", "15")
    kills, processes, seed, rate, epochs = (*given, *usual[len(given) :])
    storm(int(kills), int(processes), int(seed), float(rate), int(epochs))
