"""Tasks, data and optimizers of one's own through the whole loop: killed, continued, reported.

The long tests kill a process of their own with SIGKILL: `python -m tests.test_own NAME DIRECTORY`.
"""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import bigbatch as bb
from bigbatch.training import loop
from tests import trained
from tests.own import (
    bfloat16,
    frozen_backbone,
    linen_batch_norm,
    mapped_tokens,
    nnx_grain,
    optimizers,
    padded_tokens,
    regression,
)
from tests.storm import records

TOKENS = Path("tokens.bin")


def mapped(**options):
    return mapped_tokens.prepare(TOKENS, epochs=4.0, **options)


# Name -> what prepares it, and the metric that its page shows.
CASES = {
    "nnx_grain": (nnx_grain.prepare, "accuracy"),
    "linen_batch_norm": (linen_batch_norm.prepare, "accuracy"),
    "regression": (regression.prepare, "loss"),
    "padded_tokens": (padded_tokens.prepare, "perplexity"),
    "bfloat16": (bfloat16.prepare, "accuracy"),
    "float32_masters": (functools.partial(bfloat16.prepare, float32_masters=True), "accuracy"),
    "frozen_backbone": (frozen_backbone.prepare, "loss"),
    "mapped_tokens": (mapped, None),
    **{
        name: (functools.partial(optimizers.prepare, name), "loss")
        for name in optimizers.OPTIMIZERS
    },
}
ORDINARY = ("nnx_grain", "padded_tokens", "schedule_free")
SETTINGS = {"evaluate_every_epochs": 1, "checkpoint_every_updates": 7}
CLOCK = {"seconds": 0, "compilations": 0}


@pytest.fixture(autouse=True)
def tokens(tmp_path, monkeypatch):
    """A small file of tokens in the current directory."""
    monkeypatch.chdir(tmp_path)
    np.arange(640 * mapped_tokens.LENGTH, dtype=np.uint16).tofile(TOKENS)


@pytest.mark.parametrize("name", ORDINARY)
def test_a_killed_run_of_ones_own_ends_as_an_undisturbed_one(name, tmp_path, monkeypatch):
    prepare, metric = CASES[name]
    run = prepare()
    expected = bb.train(run, tmp_path / "undisturbed", **SETTINGS)
    monkeypatch.setattr(loop, "updates", trained.stopping(loop.updates, 12))
    with pytest.raises(trained.StopError):
        bb.train(run, tmp_path / "killed", **SETTINGS)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = bb.train(run, tmp_path / "killed", **SETTINGS)
    assert result | CLOCK == expected | CLOCK
    assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")
    check_verbs(run, tmp_path / "killed", result, metric)
    # On other devices the same examples, random numbers and sums, added in another order.
    other = bb.fit(prepare(mesh=data_mesh(4), microbatch_examples_per_device=16))
    own = bb.fit(run)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(own.params)}
    tolerance = 2e-2 if kinds == {jax.numpy.dtype("bfloat16")} else 1e-3
    for a, b in zip(jax.tree.leaves(own.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)


def data_mesh(devices):
    from bigbatch.engine.functions import data_mesh

    return data_mesh(jax.devices()[:devices])


def check_verbs(run, directory, result, metric):
    """Evaluation, export, and a report whose page has the task's own metric."""
    assert bb.evaluate(run, directory) == {n: v for n, v in result.items() if n[:5] == "test_"}
    out = directory.with_suffix(".npz")
    said = bb.export(run, directory, out)
    with np.load(out) as arrays:
        assert len(arrays.files) == said["arrays"]
    page = bb.report([directory], directory.with_suffix(".report")).page.read_text()
    shown = f"test {metric}" if metric else "training loss"
    assert shown in page
    assert metric == "accuracy" or "accuracy" not in page


def test_the_guide_shows_these_very_files():
    guide = (Path(__file__).parents[1] / "docs" / "own.md").read_text()
    for path in (Path(__file__).parent / "own").glob("[!_]*.py"):
        assert f"```python\n{path.read_text()}```" in guide, path.name


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_process_that_is_killed_ends_as_an_undisturbed_one(name, tmp_path):
    results = []
    for kills in (0, 2):
        directory = tmp_path / str(kills)
        for killed in range(kills + 1):
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.test_own",
                    name,
                    str(directory),
                    str(TOKENS.absolute()),
                ],
                cwd=Path(__file__).parents[1],
            )
            if killed == kills:
                assert process.wait(600) == 0
                break
            wanted = 8 * (killed + 1)
            while process.poll() is None and lines(directory) < wanted:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        results.append(json.loads((directory / "result.json").read_text()) | CLOCK)
    assert results[0] == results[1]
    assert records(tmp_path / "0") == records(tmp_path / "2")


def lines(directory):
    log = directory / "metrics.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def main(name, directory, tokens):
    global TOKENS
    TOKENS = Path(tokens)
    prepare, _ = CASES[name]
    bb.train(prepare(), directory, on_record=lambda record: time.sleep(0.2), **SETTINGS)


if __name__ == "__main__":
    main(*sys.argv[1:])
