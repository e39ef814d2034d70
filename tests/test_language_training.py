"""A language model through the whole loop: killed on 1, then 4, then 2 devices."""

import jax
import numpy as np
import pytest

from bigbatch.config.config import read_config
from bigbatch.data.tokens import TokenData
from bigbatch.training import loop
from bigbatch.training.microbatches import requests
from tests import trained
from tests.storm import records

# 5 updates of 16 sequences, then 8 of 64.
POLICY = {**trained.DECAY, "learning_rate": 3e-3, "batch_size": 16, "momentum": 0.0}
TREE = trained.tree(
    ghost_batch_examples=8,
    data={"name": "bible_kjv", "sequence_tokens": 16, "train_examples": 400, "test_examples": 32},
    model={"name": "transformer", "layers": 1, "width": 8, "heads": 2, "vocabulary": 256},
    optimizer={"name": "adamw", "weight_decay": 0.1},
    policy={**POLICY, "boundaries_epochs": [0.2]},
    transformations=[{"name": "grow_batch", "max_batch_size": 64}],
    microbatch_examples_per_device=8,
    evaluation_batch_examples=32,
    checkpoint_every_updates=2,
    reproducible=True,
)


def train(directory, devices, monkeypatch, stop_at=None, shard="none"):
    """Trains on so many devices, to an update; the tokens of each position that were made."""
    shown = {}
    training = TokenData.training

    def watched(self, seed, first_example, num_examples):
        made = training(self, seed, first_example, num_examples)
        for position, row in enumerate(made["tokens"], first_example):
            assert shown.setdefault(position, row.tobytes()) == row.tobytes()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(TokenData, "training", watched)
        run = trained.prepared(read_config(TREE | {"shard": shard}), devices)
        if stop_at is None:
            return trained.train(run, directory), shown
        patch.setattr(loop, "updates", trained.stopping(loop.updates, stop_at))
        with pytest.raises(trained.StopError):
            trained.train(run, directory)
    return None, shown


@pytest.mark.long
@pytest.mark.parametrize(
    "starts",
    [
        [(1, 4), (4, 9), (2, None)],
        # Checkpoints in parts are read in others, and whole.
        [(8, 4, {"layer": 4}), (4, 9, {"layer": 2}), (2, 11, "update"), (1, None, "none")],
    ],
)
def test_any_devices_show_the_same_tokens_and_give_the_same_bits(starts, tmp_path, monkeypatch):
    expected, whole = train(tmp_path / "whole", 1, monkeypatch)
    assert expected["updates"] == len(read_config(TREE).plan.batch_sizes) > 9
    parts = [
        train(tmp_path / "moved", devices, monkeypatch, stop_at, *shard)
        for devices, stop_at, *shard in starts
    ]
    result = parts[-1][0]
    assert result["params_sha256"] == expected["params_sha256"]
    assert result["train_loss"] == expected["train_loss"]
    # An evaluation's sums are those of the devices that there are.
    np.testing.assert_allclose(result["test_loss"], expected["test_loss"], rtol=1e-6)
    for _, shown in parts:
        assert shown.items() <= whole.items()
    assert set().union(*[shown for _, shown in parts]) == whole.keys()
    logs = [
        [record for record in records(tmp_path / name) if "test_loss" not in record]
        for name in ("moved", "whole")
    ]
    assert logs[0] == logs[1] != []


def test_a_gradient_is_computed_by_one_program_on_any_devices():
    """Attention's derivative is where the compiler may go two ways; see `programs`."""
    sums = []
    for devices in (1, 2):
        run = trained.prepared(read_config(TREE), devices)
        state, accumulator = run.init_state(), run.programs.empty_accumulator()
        # The first update only finds the bounds of the sums.
        for update in (0, 0):
            for request in requests(run.plan, run.layout, update, update + 1):
                size, examples = run.microbatch(request)
                accumulator = run.programs.accumulate[size](
                    state, accumulator, examples, run.frozen
                )
            hyper = {
                n: np.float32(run.plan.row(update).hyper[n]) for n in run.optimizer.hyper_names
            }
            state, accumulator, _ = run.programs.apply_update(state, accumulator, hyper)
        sums.append(jax.tree.map(np.array, state.optimizer))
    jax.tree.map(np.testing.assert_array_equal, *sums)
    assert any(leaf.any() for leaf in jax.tree.leaves(sums[0]))
