"""A storm of SIGKILLs and of the signals that a run heeds over one short run.

    python -m tests.storm KILLS [SEED [increase | adaptive]]

Every process that is started is killed while it lives, at a moment drawn at random: some at fixed
events (compilation, the writing of a checkpoint, an evaluation, a stage change), some at any time.
Only processes that were really killed count. A run that ends before there were enough is followed
by another one, in a new working directory. Each is compared with an undisturbed one. Descriptors
and threads of the processes that end by themselves are counted: checkpoints leave none behind.
"""

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigbatch.workdir import starts

ROOT = Path(__file__).parents[1]
EVALUATE_EVERY = 5
# Records without a stage change until a kill comes all the same.
PATIENCE = 60
# What is told to stop has so long, on a machine that may be at work.
STOP_S = 1_800
# Descriptors and threads of a checkpoint that is being written.
SPARE = 10
# Experiment -> what it changes. An adaptive run decides a growth every few updates here.
OVERRIDES = {
    "increase": ("--config.policy.boundaries_epochs=(5,9,12)",),
    "adaptive": ("--config.policy.multiple=4", "--config.microbatch_examples_per_device=16"),
}
MOMENTS = ("start", "compilation", "loop", "checkpoint", "evaluation", "stage change")


def records(directory: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    # The last one may just be being written.
    lines = [line for line in lines if line.endswith("\n")]
    clocks = ("examples_per_s", "tokens_per_s", "input_wait_s", "unix_s")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def positions(directory: Path) -> list[tuple[int, int]]:
    """First and last position of every update, as the training records have them."""
    train = [record for record in records(directory) if "train_loss" in record]
    return [(record["examples"] - record["batch_size"], record["examples"]) for record in train]


def wait_for(
    moment: str, directory: Path, process: subprocess.Popen, moments: random.Random
) -> str:
    """Returns at a moment of a kind, or when the process has ended.

    Returns:
      The kind that it was: where no stage changes any more, the loop.
    """
    log, saved = directory / "metrics.jsonl", directory / "checkpoints"
    before = records(directory) if log.exists() else []
    sizes = {record["batch_size"] for record in before}
    if moment == "start":
        time.sleep(moments.uniform(0, 4))
        return moment

    def grown() -> bool:
        now = records(directory) if log.exists() else []
        return bool(sizes) and bool({record["batch_size"] for record in now} - sizes)

    def reached() -> bool:
        if moment == "compilation":
            return any((directory / "programs").rglob("*.compiling"))
        if moment == "checkpoint":
            return saved.exists() and any(saved.glob("*.orbax-checkpoint-tmp"))
        # A start removes the records past its checkpoint; whatever differs then is new.
        now = records(directory) if log.exists() else []
        if moment == "evaluation":
            last = now[-1]["update"] if now and now != before else 0
            return last % EVALUATE_EVERY == EVALUATE_EVERY - 1
        if moment == "stage change":
            return grown() or (bool(sizes) and len(now) > len(before) + PATIENCE)
        return now != before

    while process.poll() is None and not reached():
        time.sleep(0.002)
    if moment == "stage change" and not grown():
        moment = "loop"
    time.sleep(moments.uniform(0, 0.3 if moment == "loop" else 0.05))
    return moment


def steady(process: subprocess.Popen, directory: Path) -> str:
    """Waits for a process; makes sure that it ends with what it held after three checkpoints.

    Returns:
      The descriptors and threads that it held, in words.
    """
    held: dict[int, list[tuple[int, int]]] = {}
    while process.poll() is None:
        steps = [int(p.name) for p in directory.glob("checkpoints/*") if p.name.isdigit()]
        with contextlib.suppress(OSError):
            counts = [len(os.listdir(f"/proc/{process.pid}/{kind}")) for kind in ("fd", "task")]
            if steps:
                held.setdefault(max(steps), []).append((counts[0], counts[1]))
        time.sleep(0.01)
    early = [counts for step in sorted(held)[:3] for counts in held[step]]
    # At its end a process closes one after the other: the first look after the last checkpoint.
    late = held[max(held)][0] if held else (0, 0)
    for place, kind in enumerate(("descriptors", "threads")):
        most = max((counts[place] for counts in early), default=0)
        assert late[place] <= most + SPARE, f"{late[place]} {kind}, {most} at first"
    return f"{len(held)} checkpoints: {max(early, default=0)} at first, {late} at the end"


def command_for(experiment: str, directory: Path) -> list[str]:
    """The command of the short run."""
    return [
        *(sys.executable, "-m", "bigbatch", "train"),
        f"--config={ROOT / 'configs/digits.py'}:{experiment}",
        *("--config.epochs=15", *OVERRIDES[experiment]),
        *("--config.checkpoint_every_updates=3", "--config.log_every_updates=1"),
        f"--config.evaluate_every_updates={EVALUATE_EVERY}",
        f"--workdir={directory}",
        f"--compilation-cache={directory / 'programs'}",
    ]


def storm(directory: Path, kills: int, seed: int, experiment: str) -> collections.Counter:
    """Kills up to so many processes of one run and lets it end; counts them by kind and moment."""
    moments, counts = random.Random(seed), collections.Counter()
    # What is ignored where this was started in the background would be ignored by the runs, too.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    command = command_for(experiment, directory)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL}
    while sum(counts.values()) < kills and not (directory / "result.json").exists():
        number = moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        moment = moments.choice(MOMENTS)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
        try:
            moment = wait_for(moment, directory, process, moments)
            if process.poll() is None:
                process.send_signal(number)
                status = process.wait(STOP_S)
                if status in (-number, 128 + number):
                    counts[f"{signal.Signals(number).name} {moment}"] += 1
        finally:
            process.kill()
            process.wait()
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.Popen(command, stderr=said, **options)
        print(f"{directory.name}, descriptors and threads: {steady(done, directory)}", flush=True)
        said.seek(0)
        if done.returncode:
            raise RuntimeError(said.read())
    return counts


def compare(disturbed: Path, undisturbed: Path) -> None:
    """Makes sure that nothing differs, and that every position was trained exactly once."""
    results = [json.loads((d / "result.json").read_text()) for d in (disturbed, undisturbed)]
    assert results[0]["params_sha256"] == results[1]["params_sha256"], "other parameters"
    assert records(disturbed) == records(undisturbed), "another log"
    plans = [(d / "plan.json").read_bytes() for d in (disturbed, undisturbed)]
    assert plans[0] == plans[1], "another plan"
    spans = positions(disturbed)
    assert spans[0][0] == 0, "the first example is missing"
    follows = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert follows, "a gap or a repetition"
    assert spans[-1][1] == results[0]["examples"], "the end is missing"


def storms(
    directory: Path, kills: int, seed: int, experiment: str = "increase"
) -> tuple[collections.Counter, int]:
    """Kills so many processes, in as many runs as it takes; every run ends as an undisturbed one.

    Returns:
      The kills by kind and moment, and how many runs there were.
    """
    counts: collections.Counter = collections.Counter()
    storm(directory / "undisturbed", 0, 0, experiment)
    runs = 0
    while sum(counts.values()) < kills:
        disturbed = directory / f"disturbed_{runs}"
        counts += storm(disturbed, kills - sum(counts.values()), seed + runs, experiment)
        compare(disturbed, directory / "undisturbed")
        runs += 1
    return counts, runs


def main(kills: str, seed: str = "0", experiment: str = "increase") -> None:
    directory = Path(tempfile.mkdtemp())
    counts, runs = storms(directory, int(kills), int(seed), experiment)
    result = json.loads((directory / "undisturbed" / "result.json").read_text())
    sizes = sorted({record["batch_size"] for record in records(directory / "undisturbed")})
    print(f"{sum(counts.values())} processes of {experiment} killed alive in {runs} runs")
    print(f"{result['updates']} updates, batch sizes {sizes}")
    print(f"each run ended as undisturbed: {result['params_sha256']}")
    for path in sorted(directory.iterdir()):
        print(f"{path.name}: {starts.goodput_line(starts.before(path / 'starts.json'))}")
    for name, count in sorted(counts.items()):
        print(f"{count:4} {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
