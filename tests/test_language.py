"""The transformer and its loss: against NumPy, of one token after the other, in little memory."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import bigbatch as bb
from bigbatch.engine import task_checks
from bigbatch.engine.functions import data_mesh
from bigbatch.errors import UserError
from bigbatch.models import TransformerConfig
from bigbatch.models.language import cross_entropy, language_model, next_token_sums

SMALL = TransformerConfig(layers=2, width=8, heads=2, vocabulary=11, dtype="float64")
KINDS = {
    "today's": SMALL,
    "gpt": dataclasses.replace(SMALL, activation="gelu", tied=False, qk_norm=False),
}
LENGTH = 5


def examples_of(config, count=2, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocabulary, (count, length + 1), np.uint16)
    return {"tokens": tokens, "weight": np.ones(count, np.float32)}


def made(config, examples):
    """The task for some examples, and parameters of which none is special."""
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in examples.items()}
    task = language_model(config).for_examples(shapes)
    params, statistics = jax.eval_shape(task.init, jax.eval_shape(jax.random.key, 0))
    assert statistics == {}
    rng = np.random.default_rng(1)

    def drawn(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) / math.sqrt(config.width)).astype(leaf.dtype)

    return task, jax.tree.map(drawn, params)


def loss_of(task, params, examples):
    outputs, _ = task.apply(params, {}, examples, True)
    return task.loss(outputs, examples)["loss"]


def numpy_loss(config, params, tokens):
    """The summed cross-entropy in NumPy, one sequence, position and head after the other.

    Its arithmetic holds for complex numbers: a derivative is the imaginary part of a step along
    i, without cancellation (Squire and Trapp 1998).
    """
    size = config.width // config.heads

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-6) * scale

    def turned(x, position):
        result = x.copy()
        for plane in range(size // 2):
            angle = position / 10_000 ** (2 * plane / size)
            turn = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            both = [plane, plane + size // 2]
            result[both] = turn @ x[both]
        return result

    def perceptron(block, x):
        up = x @ block["up"]["kernel"]
        if config.activation == "gelu":
            up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            gate = x @ block["gate"]["kernel"]
            up = up * gate / (1 + np.exp(-gate))
        return up @ block["down"]["kernel"]

    def heads(block, name, x, position):
        parts = (x @ block[name]["kernel"]).reshape(config.heads, size)
        if config.qk_norm and name != "value":
            parts = np.array([norm(p, block[f"{name}_norm"]["scale"]) for p in parts])
        return parts if name == "value" else np.array([turned(p, position) for p in parts])

    total = 0
    for sequence in tokens:
        states = [params["embedding"][t] * math.sqrt(config.width) for t in sequence[:-1]]
        for number in range(config.layers):
            block = params["blocks"][number]
            read = [norm(x, block["attention_norm"]["scale"]) for x in states]
            query, key, value = (
                [heads(block, name, x, position) for position, x in enumerate(read)]
                for name in ("query", "key", "value")
            )
            for position, x in enumerate(states):
                seen = []
                for head in range(config.heads):
                    scores = [
                        np.exp(query[position][head] @ key[earlier][head] / math.sqrt(size))
                        for earlier in range(position + 1)
                    ]
                    mixed = sum(s * value[e][head] for e, s in enumerate(scores))
                    seen.append(mixed / sum(scores))
                states[position] = x + np.concatenate(seen) @ block["attended"]["kernel"]
            states = [x + perceptron(block, norm(x, block["inner_norm"]["scale"])) for x in states]
        output = params["embedding" if config.tied else "output"]
        for x, target in zip(states, sequence[1:], strict=True):
            logits = output @ norm(x, params["norm"]["scale"])
            total = total + np.log(np.sum(np.exp(logits))) - logits[target]
    return total


def assert_gradients(config, params, gradients, texts, *, count=1, singles=0):
    """Of the summed loss over a count: of each array some elements, and a random direction."""
    flat, found = flatten_dict(params), flatten_dict(gradients)
    rng = np.random.default_rng(2)
    for path, leaf in flat.items():
        numbers = rng.integers(leaf.size, size=singles)
        steps = [np.eye(leaf.size)[i].reshape(leaf.shape) for i in numbers]
        for step in [*steps, rng.normal(size=leaf.shape)]:
            moved = unflatten_dict(flat | {path: leaf + 1e-30j * step})
            expected = numpy_loss(config, moved, texts).imag / 1e-30 / count
            largest = np.abs(found[path]).max()
            assert abs(np.sum(found[path] * step) - expected) < 1e-10 * largest, path


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_equal_a_numpy_implementation(name):
    config = KINDS[name]
    examples = examples_of(config)
    with jax.enable_x64(True):
        task, params = made(config, examples)
        gradient = jax.jit(jax.value_and_grad(lambda p: loss_of(task, p, examples)))
        loss, gradients = jax.device_get(gradient(params))
    tokens = examples["tokens"]
    np.testing.assert_allclose(loss, numpy_loss(config, params, tokens), rtol=1e-12)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_parameters()
    assert_gradients(config, params, gradients, tokens, singles=3)


def test_later_tokens_change_nothing_earlier():
    config = dataclasses.replace(SMALL, dtype="float32")
    examples = examples_of(config, count=1, length=12)
    task, params = made(config, examples)
    params = jax.tree.map(jnp.asarray, params)
    hidden = jax.jit(lambda tokens: task.apply(params, {}, {"tokens": tokens}, True)[0][0][0])
    whole = np.asarray(hidden(examples["tokens"]))
    for position in range(12):
        other = examples["tokens"].copy()
        other[0, position] = (other[0, position] + 1) % 11
        found = np.asarray(hidden(other))
        np.testing.assert_array_equal(found[:position], whole[:position])
        # And what comes after a token sees it.
        assert (found[position:] != whole[position:]).any(axis=1).all()


def test_rematerialised_blocks_give_the_same_and_keep_less():
    """What is kept for the gradient; XLA's CPU client computes nothing twice, so uses no less."""
    examples = examples_of(SMALL, length=32)
    found, kept = [], []
    with jax.enable_x64(True):
        for remat in (False, True):
            task, params = made(dataclasses.replace(SMALL, remat=remat), examples)
            loss = functools.partial(loss_of, task, examples=examples)
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(params)))
            held = jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params)
            kept.append(sum(leaf.size for leaf in jax.tree.leaves(held)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *found)
    assert kept[1] < 0.5 * kept[0]


def test_other_types_differ_by_their_rounding():
    examples = examples_of(SMALL, count=8, length=32)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(SMALL, dtype=dtype)
        task, params = made(config, examples)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
        hidden = jax.eval_shape(lambda p, t=task: t.apply(p, {}, examples, True)[0][0], params)
        assert hidden.dtype == dtype
        losses[dtype] = jax.jit(loss_of, static_argnums=0)(task, params, examples)
        assert losses[dtype].dtype == jnp.float32
        exact = numpy_loss(config, jax.tree.map(np.float64, params), examples["tokens"])
        error = abs(losses[dtype] / exact - 1)
        assert error < 2e-6 if dtype == "float32" else 1e-6 < error < 0.02


@pytest.mark.parametrize("tied", [True, False])
def test_the_beginning_is_a_guess_at_any_depth(tied):
    """The loss is that of a guess, the gradients of all blocks are of one order.

    (Untied logits begin with variance 1, which costs half a nat; tied ones with 1 / width.)
    """
    for layers in (1, 8):
        config = TransformerConfig(layers=layers, width=64, heads=4, vocabulary=256, tied=tied)
        examples = examples_of(config, count=4, length=32)
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in examples.items()}
        task = language_model(config).for_examples(shapes)
        # Not compiled as one: the blocks' operations are the same ones.
        params, _ = task.init(jax.random.key(3))
        gradient = jax.value_and_grad(lambda p, task=task: loss_of(task, p, examples))
        loss, gradients = gradient(params)
        loss /= examples["tokens"][:, 1:].size
        assert abs(loss - math.log(256) - (0 if tied else 0.5)) < (0.05 if tied else 0.15)
        norms = [
            np.linalg.norm(block["down"]["kernel"]) * math.sqrt(layers)
            for block in gradients["blocks"].values()
        ]
        assert max(norms) < 10 * min(norms)


def plain(hidden, output, targets):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ output.T, targets)


@pytest.mark.parametrize("chunk", [7, 20, 59, 60, 100])
def test_a_loss_in_chunks_equals_the_plain_one(chunk):
    rng = np.random.default_rng(0)
    hidden, output = rng.normal(size=(3, 4, 16)), rng.normal(size=(60, 16))
    targets = rng.integers(0, 60, (3, 4))
    # Logits that no exponential holds.
    hidden[0, 0] *= 1e3
    weight = rng.normal(size=(3, 4))
    for dtype, tolerance in (("float64", 1e-12), ("float32", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            arrays = jnp.asarray(hidden, dtype), jnp.asarray(output, dtype)
            found, expected = (
                jax.value_and_grad(lambda a, b, f=f: jnp.sum(weight * f(a, b, targets)), (0, 1))(
                    *arrays
                )
                for f in (lambda *a: cross_entropy(*a, chunk_tokens=chunk), plain)
            )
        largest = [np.abs(leaf).max() for leaf in jax.tree.leaves(expected)]
        for a, b, scale in zip(*map(jax.tree.leaves, (found, expected)), largest, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def test_in_bfloat16_all_products_are_of_bfloat16_numbers():
    """As lowered; and what they give is near that of float64."""
    rng = np.random.default_rng(0)
    hidden, output = rng.normal(size=(4, 16)), rng.normal(size=(60, 16))
    targets = rng.integers(0, 60, 4)

    def gradient(hidden, output):
        losses = lambda *a: jnp.sum(cross_entropy(*a, targets, chunk_tokens=20))  # noqa: E731
        return jax.jit(jax.grad(losses, (0, 1))).lower(hidden, output)

    narrow = gradient(*(jnp.asarray(x, jnp.bfloat16) for x in (hidden, output)))
    products = re.findall(r"dot_general.*: \((.*)\) ->", narrow.as_text())
    assert len(products) >= 3
    assert not [types for types in products if "f32" in types]
    found = narrow.compile()(*(jnp.asarray(x, jnp.bfloat16) for x in (hidden, output)))
    with jax.enable_x64(True):
        expected = gradient(hidden, output).compile()(hidden, output)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.03 * np.abs(b).max())


def test_a_large_vocabulary_takes_less_than_a_third_of_the_memory():
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2048, 64), "float32"), ((50_257, 64), "float32"), ((2048,), "int32"))
    ]
    peaks = []
    for loss in (cross_entropy, plain):
        gradient = jax.grad(lambda *a, f=loss: jnp.sum(f(*a)), (0, 1))
        analysis = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        peaks.append(
            analysis.temp_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.argument_size_in_bytes
        )
    assert peaks[0] < peaks[1] / 3


def test_the_bundled_task_is_right():
    """What is asked of everybody's."""
    for mask in ({}, {"mask": jax.ShapeDtypeStruct((2, LENGTH), bool)}):
        shapes = {
            "tokens": jax.ShapeDtypeStruct((2, LENGTH + 1), np.uint16),
            "weight": jax.ShapeDtypeStruct((2,), np.float32),
            **mask,
        }
        task = language_model(dataclasses.replace(SMALL, dtype="float32")).for_examples(shapes)
        ghosts = {"ghost_mask": jax.ShapeDtypeStruct((2,), np.float32)}
        found = task_checks.check_task(task, shapes | ghosts)
        assert found.running_statistics == {}
        assert task.quotients({"loss": 10.0, "count": 5.0}) == {
            "loss": 2.0,
            "perplexity": math.exp(2),
        }
        assert task.quotients({"loss": 1e6, "count": 1.0})["perplexity"] > 1e300


class Uneven:
    """Texts of all lengths, filled up with what is no target."""

    def __init__(self, count):
        rng = np.random.default_rng(5)
        self.lengths = rng.integers(0, LENGTH + 1, count)
        self.tokens = rng.integers(0, 11, (count, LENGTH + 1), np.int32)

    def __len__(self):
        return len(self.lengths)

    def read(self, numbers):
        mask = np.arange(LENGTH) < self.lengths[numbers, None]
        return {"tokens": self.tokens[numbers], "mask": mask}


# Each compiles for a quarter of a minute.
@pytest.mark.parametrize(
    ("devices", "share"),
    [
        (2, 4),
        *(pytest.param(*cut, marks=pytest.mark.long) for cut in [(1, 24), (1, 1), (4, 6), (8, 3)]),
    ],
)
def test_an_update_is_the_mean_over_all_tokens(devices, share):
    config = dataclasses.replace(SMALL, layers=1)
    data, batch, rate = Uneven(40), 24, 0.1
    with jax.enable_x64(True):
        plan = bb.make_plan(bb.constant(rate, batch, 0.0), train_examples=40, epochs=batch / 40)
        run = bb.prepare(
            *(language_model(config), bb.Data(data), plan, bb.Sgd()),
            microbatch_examples_per_device=share,
            mesh=data_mesh(jax.devices()[:devices]),
        )
        params = jax.device_get(run.init_state().params)
        gradients = jax.tree.map(
            lambda p, q: (p - np.asarray(q)) / rate, params, bb.fit(run).params
        )
    texts = []
    for row in bb.Data(data).training(0, 0, batch)["tokens"]:
        (number,) = np.flatnonzero((data.tokens == row).all(axis=1))
        texts.append(row[: data.lengths[number] + 1])
    # Of the texts as they are, each alone.
    tokens = sum(len(text) - 1 for text in texts)
    assert_gradients(config, params, gradients, texts, count=tokens)


def test_masked_examples_of_any_content_add_nothing():
    examples = examples_of(SMALL, count=2)
    outputs = jnp.array([[[1.0] * 8] * LENGTH, [[jnp.nan] * 8] * LENGTH]), jnp.ones((11, 8))
    sums = next_token_sums(outputs, {**examples, "weight": np.float32([1, 0])})
    assert sums["count"] == LENGTH
    assert float(sums["loss"]) == pytest.approx(LENGTH * math.log(11))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"width": 10, "heads": 4}, "width: given 10; nearest: .*; allowed: an even multiple"),
        ({"layers": 0}, "layers: given 0"),
    ],
)
def test_shapes_that_are_none(fields, problem):
    with pytest.raises(UserError, match=problem):
        dataclasses.replace(SMALL, **fields)


def test_the_number_of_parameters_is_known_without_jax():
    for activation, tied, qk_norm in itertools.product(("swiglu", "gelu"), *[(True, False)] * 2):
        config = dataclasses.replace(SMALL, activation=activation, tied=tied, qk_norm=qk_norm)
        with jax.enable_x64(True):
            params = jax.eval_shape(lambda config=config: made(config, examples_of(config))[1])
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_parameters()
