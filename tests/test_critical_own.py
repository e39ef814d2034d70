"""`bigbatch.critical` of one's own task with Adam: targets in its metric, noise by geometry."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch as bb
from bigbatch.commands.critical.geometries import noise_scales
from bigbatch.engine.functions import data_mesh
from bigbatch.errors import UserError
from bigbatch.training.restore import newest

EXAMPLES, AT = 256, 10
SIZES = {"at_updates": [AT], "sizes": (8, 16, 32), "branches": 2, "most_epochs": 8}


def loss(logits, examples):
    weight, label = examples["weight"], examples["label"]
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
    sums = {"loss": -logs, "count": jnp.ones_like(logs), "probability": jnp.exp(logs)}
    return {name: jnp.sum(weight * values) for name, values in sums.items()}


def arrays():
    random = np.random.default_rng(0)
    x = random.normal(size=(EXAMPLES, 6)).astype(np.float32)
    label = np.argmax(x[:, :3] + 0.4 * random.normal(size=(EXAMPLES, 3)), axis=1)
    return {"x": x, "label": label.astype(np.int32)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of softmax regression on scaled inputs, one example a small batch; its directory."""
    task = bb.Task(
        init=lambda key: ({"matrix": jnp.zeros((6, 3)), "scale": jnp.ones(6)}, {}),
        apply=lambda params, statistics, examples, train: (
            (examples["x"] * params["scale"]) @ params["matrix"],
            {},
        ),
        loss=loss,
        metrics={
            "probability": "probability",
            "perplexity": lambda means: math.exp(means["loss"]),
        },
    )
    plan = bb.make_plan(bb.constant(0.01, 8, 0.0), train_examples=EXAMPLES, epochs=1)
    run = bb.prepare(
        task,
        bb.Data(arrays()),
        plan,
        bb.Adam(),
        microbatch_examples_per_device=8,
        mesh=data_mesh(jax.devices()[:1]),
    )
    directory = tmp_path_factory.mktemp("critical") / "run"
    bb.train(run, directory, checkpoint_every_updates=AT, keep_every_updates=AT)
    return run, directory


def test_the_noise_of_a_whole_epoch_in_each_geometry(trained):
    """Of all examples one by one it is that of the training set, in closed form."""
    run, directory = trained
    run = run.again(noise_small_batch_examples=1)
    state, _ = newest(run, directory, AT)
    found = noise_scales(run, state, 1e9)
    data, params = arrays(), jax.tree.map(np.float64, state.params)
    x = data["x"] * params["scale"]
    errors = np.exp(x @ params["matrix"])
    errors /= errors.sum(1, keepdims=True)
    errors[np.arange(EXAMPLES), data["label"]] -= 1
    matrices = x[:, :, None] * errors[:, None]
    scales = data["x"] * (errors @ params["matrix"].T)
    gradients = np.concatenate([matrices.reshape(EXAMPLES, -1), scales], axis=1)

    def ratio(gradients):
        return np.sum(gradients.var(0, ddof=1)) / np.sum(gradients.mean(0) ** 2)

    [(_, second), *_] = optax.tree_utils.tree_get_all_with_path(state.optimizer, "nu")
    second = np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(second)])
    apart = matrices - matrices.mean(0)
    spectrum = np.linalg.svd(apart.reshape(-1, 3), compute_uv=False)
    # What a standard deviation is short of, in the mean.
    c4 = 1 - 1 / (4 * (EXAMPLES - 1))
    expected = {
        "l2": ratio(gradients),
        "norms": ratio(scales),
        "adam": ratio(gradients / (np.sqrt(second) + 1e-8)),
        "adam_root": ratio(gradients / (second**0.25 + 1e-8)),
        "sign": (gradients.std(0, ddof=1).sum() / c4 / np.abs(gradients.mean(0)).sum()) ** 2,
        "spectral": (spectrum.sum() / np.linalg.norm(matrices.mean(0), "nuc")) ** 2
        / (EXAMPLES - 1),
    }
    assert set(found) == set(expected)
    for name, (scale, error) in found.items():
        assert scale == pytest.approx(expected[name], rel=2e-3)
        assert 0 < error < scale


def test_a_target_in_the_metric_of_the_task(trained):
    """One that rises; the best of two learning rates counts, as the rule is not Adam's."""
    run, directory = trained
    with pytest.raises(UserError, match="several lr_factors"):
        bb.critical(run, directory, target=("probability", 0.65), **SIZES)
    asked = {"lr_factors": (1, 2), **SIZES}
    with pytest.raises(UserError, match="target: given 'probabilty'"):
        bb.critical(run, directory, target=("probabilty", 0.65), **asked)
    [point] = bb.critical(run, directory, target=("probability", 0.65), **asked)
    assert point.metric == "probability"
    shown = point.noise.metrics
    assert 1 / 3 < shown["probability"] < 0.65 == point.target_loss
    assert shown["perplexity"] == pytest.approx(math.exp(point.noise.loss))
    text = (directory / "critical" / "critical.md").read_text()
    assert "Branches to a training probability of 0.65:" in text
    # What a branch was at, about the updates that it is said to have needed.
    for size in point.sizes:
        name = f"batch_{size.batch_size}_lr_{size.learning_rate:.4g}_branch_0.json"
        path = directory / "critical" / f"update_{AT}" / name
        values = json.loads(path.read_text())["answer"]["losses"]
        after = size.updates[0]
        half = max(after / 4, 256 / size.batch_size)
        near = values[round(after - half) : round(after + half) + 1]
        assert np.mean(near) == pytest.approx(0.65, abs=0.02)
        assert values[0] < 0.5
