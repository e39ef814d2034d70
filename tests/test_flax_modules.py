"""Flax's own modules as tasks, against Flax's own training loop and rules written in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bigbatch.engine import functions
from bigbatch.engine.flax_modules import from_linen, from_nnx
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.models.ghost_norm import GhostNorm
from tests.optimizers import empty_accumulator

GHOST = 8
FEATURES = 3
RATE = 0.1


class NnxNet(nnx.Module):
    """A linear layer between two norms of different momenta."""

    def __init__(self, rngs, **options):
        self.first = nnx.BatchNorm(FEATURES, momentum=0.9, rngs=rngs, **options)
        self.linear = nnx.Linear(FEATURES, 4, rngs=rngs)
        self.second = nnx.BatchNorm(4, rngs=rngs, **options)  # Its momentum is 0.99.

    def __call__(self, x):
        return self.second(self.linear(self.first(x)))


class LinenNet(nn.Module):
    """The same."""

    accurate: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            use_fast_variance=not self.accurate,
        )
        x = nn.Dense(4, name="linear")(norm(momentum=0.9, name="first")(x))
        return norm(name="second")(x)


def squares(outputs, examples):
    error = jnp.sum(
        jnp.square(outputs.astype(jnp.float32) - 1.0), axis=tuple(range(1, outputs.ndim))
    )
    weight = examples["weight"]
    return {"loss": jnp.sum(weight * error), "count": jnp.sum(weight)}


def examples_of(x, seed=0):
    size = len(x)
    keys = np.random.default_rng(seed).integers(0, 2**32, (size, 2), np.uint32)
    return {"x": x, "weight": np.ones(size, np.float32), "key": keys}


def made(task, like=None, ghost=GHOST):
    """The task for ghost batches of x, [examples, features] unless it is said otherwise."""
    x = jax.ShapeDtypeStruct((ghost, FEATURES), np.float32)
    shapes = {"x": x, "weight": jax.ShapeDtypeStruct((ghost,), np.float32)} | (like or {})
    return task.for_examples(shapes)


def apply(task, *arguments):
    return jax.jit(task.apply, static_argnums=3)(*arguments)


def masked(examples, ghost=GHOST):
    return examples | {"ghost_mask": np.ones(len(examples["weight"]) // ghost, np.float32)}


@functools.cache
def program(task, devices):
    mesh = functions.data_mesh(jax.devices()[:devices])

    @jax.jit
    def step(params, running, parts, frozen, rate):
        state = functions.State(params, running, ())
        accumulator = empty_accumulator(task, state, parts[0], mesh)
        for part in parts:
            accumulator = functions.accumulate(
                state, accumulator, part, frozen, task=task, mesh=mesh
            )
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), accumulator)
        count = total.sums["count"]
        params = jax.tree.map(lambda p, g: p - rate * g / count, params, total.gradients)
        running = functions.advance_running_statistics(
            running, total.ghost_statistics, total.ghost_batches, decay=task.running_decay
        )
        return params, running, total.sums

    return step


def update(task, params, running, examples, devices=1, microbatches=1, rate=RATE):
    """One update by plain gradient descent: the next parameters and statistics, and the sums."""
    parts = [
        masked({name: np.split(array, microbatches)[i] for name, array in examples.items()})
        for i in range(microbatches)
    ]
    step = program(task, devices)
    return jax.device_get(step(params, running, parts, task.frozen, rate))


def assert_close(found, expected, rtol=1e-6, atol=1e-6):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected
    )


def batches(number, size, mean=2.0, seed=1):
    draws = np.random.default_rng(seed).normal(size=(number, size, FEATURES))
    return (mean + draws * [1, 2, 3]).astype(np.float32)


def trained(start, gradient, evaluate, x):
    """The parameters before and after plain gradient descent, the statistics and the outputs."""
    params, stats = first, _ = start

    @jax.jit
    def step(params, stats, batch):
        gradients, stats = gradient(params, stats, batch)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), stats

    for batch in x:
        params, stats = step(params, stats, batch)
    return jax.device_get((first, params, stats, jax.jit(evaluate)(params, stats, x[0])))


def mean_squares(outputs):
    return jnp.mean(jnp.sum(jnp.square(outputs - 1), axis=1))


def flax_nnx(x):
    """Flax's own loop with an NNX network."""
    kinds = nnx.Param, nnx.BatchStat

    @jax.jit
    def start():
        return tuple(nnx.split(NnxNet(nnx.Rngs(jax.random.key(5))), *kinds)[1:])

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))

    def gradient(params, stats, batch):
        model = nnx.merge(graphdef, params, stats)
        model.train()
        gradients = nnx.grad(lambda model: mean_squares(model(batch)))(model)
        return gradients, nnx.state(model, nnx.BatchStat)

    def evaluate(params, stats, batch):
        model = nnx.merge(graphdef, params, stats)
        model.eval()
        return model(batch)

    *states, outputs = trained(start(), gradient, evaluate, x)
    return *map(nnx.to_pure_dict, states), outputs


def flax_linen(x):
    """Flax's own loop with a Linen network."""
    module = LinenNet()
    start = jax.jit(functools.partial(module.init, train=True))(jax.random.key(5), x[0])

    def gradient(params, stats, batch):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            outputs, new = module.apply(variables, batch, train=True, mutable=["batch_stats"])
            return mean_squares(outputs), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    def evaluate(params, stats, batch):
        return module.apply({"params": params, "batch_stats": stats}, batch, train=False)

    return trained((start["params"], start["batch_stats"]), gradient, evaluate, x)


@pytest.mark.parametrize(
    ("task", "loop"),
    [(from_nnx(NnxNet, squares), flax_nnx), (from_linen(LinenNet(), squares), flax_linen)],
    ids=["nnx", "linen"],
)
def test_batch_norm_at_one_ghost_batch_an_update_is_that_of_flax(task, loop):
    x = batches(6, GHOST)
    start, params, stats, outputs = loop(x)
    task = made(task)
    own, running = jax.jit(task.init)(jax.random.key(5))
    assert_close(own, start)
    for batch in x:
        own, running, _ = update(task, own, running, examples_of(batch))
    assert_close(own, params)
    assert_close(running["batch_stats"], stats)
    found, _ = apply(task, own, running, {"x": x[0]}, False)
    assert_close(found, outputs, atol=1e-5)
    assert task.running_decay["batch_stats"]["first"] == {"mean": 0.9, "var": 0.9}
    assert task.running_decay["batch_stats"]["second"] == {"mean": 0.99, "var": 0.99}
    assert not task.shares_ghost_batches
    assert not task.takes_keys


@pytest.mark.parametrize(
    "task",
    [
        from_nnx(functools.partial(NnxNet, use_fast_variance=False), squares),
        from_linen(LinenNet(accurate=True), squares),
    ],
    ids=["nnx", "linen"],
)
def test_statistics_of_many_ghost_batches_follow_the_rule_without_order(task):
    ghosts = 4
    x = batches(5, ghosts * GHOST, mean=1e3)
    task = made(task)
    params, running = jax.jit(task.init)(jax.random.key(3))
    params["linear"]["bias"] += 1e3
    kernel = np.asarray(params["linear"]["kernel"], np.float64)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), running["batch_stats"])

    def advance(layer, decay, values):
        """Values: [ghost batches, examples, features]."""
        kept = decay**ghosts
        for name, of in (("mean", values.mean(1)), ("var", values.var(1))):
            old = expected[layer][name]
            expected[layer][name] = kept * old + (1 - kept) * of.mean(0)

    for batch in x:
        by_ghost = batch.astype(np.float64).reshape(ghosts, GHOST, FEATURES)
        advance("first", 0.9, by_ghost)
        normalised = by_ghost - by_ghost.mean(1, keepdims=True)
        normalised /= np.sqrt(by_ghost.var(1, keepdims=True) + 1e-5)
        advance("second", 0.99, normalised @ kernel + 1e3)
        _, running, _ = update(
            task, params, running, examples_of(batch), devices=2, microbatches=2, rate=0
        )
    found = running["batch_stats"]
    assert_close(found["first"], expected["first"], rtol=1e-6, atol=0)
    np.testing.assert_allclose(found["second"]["mean"], expected["second"]["mean"], rtol=1e-6)
    # The errors of the activations, numbers near 1e3, are 1e-4 of their deviation.
    np.testing.assert_allclose(found["second"]["var"], expected["second"]["var"], rtol=1e-4)


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.first, self.second = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return jnp.stack([self.first(x), self.second(x)], axis=1) * self.scale


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        scale = self.param("scale", nn.initializers.ones_init(), ())
        drop = [nn.Dropout(0.5)(x, deterministic=deterministic) for _ in range(2)]
        return jnp.stack(drop, axis=1) * scale


@pytest.mark.parametrize(
    "task",
    [from_nnx(NnxDropout, squares), from_linen(LinenDropout(), squares)],
    ids=["nnx", "linen"],
)
def test_dropout_depends_on_the_position_and_on_no_cut(task):
    task = made(task)
    assert task.takes_keys
    assert not task.shares_ghost_batches
    params, running = jax.jit(task.init)(jax.random.key(0))
    assert running == {}
    ones = np.ones((4 * GHOST, FEATURES), np.float32)
    examples = examples_of(ones)
    in_training = jax.jit(functools.partial(task.apply, train=True))

    def masks(cuts, examples):
        parts = [
            masked({n: np.split(a, cuts)[i] for n, a in examples.items()}) for i in range(cuts)
        ]
        return np.concatenate([in_training(params, {}, part)[0] for part in parts]) > 0

    whole = masks(1, examples)
    np.testing.assert_array_equal(masks(4, examples), whole)
    assert 0.3 < whole.mean() < 0.7
    # Other layers, other ghost batches, other epochs.
    assert 0.3 < np.mean(whole[:, 0] != whole[:, 1]) < 0.7
    assert 0.3 < np.mean(whole[:GHOST] != whole[GHOST : 2 * GHOST]) < 0.7
    assert 0.3 < np.mean(masks(1, examples_of(ones, seed=1)) != whole) < 0.7
    np.testing.assert_array_equal(apply(task, params, {}, {"x": ones}, False)[0], 1)
    # On several devices too.
    found, _, _ = update(task, params, {}, examples, devices=4)
    kept = 2 * whole
    gradient = np.sum(2 * (kept - 1.0) * kept) / len(ones)
    np.testing.assert_allclose(found["scale"], 1 - RATE * gradient, rtol=1e-5)


class SpectralLinen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)


class Renorm(nnx.Module):
    """Normalises by the running mean in training too."""

    def __init__(self, rngs):
        self.mean = nnx.BatchStat(jnp.zeros(FEATURES))

    def __call__(self, x, train):
        if train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jnp.mean(x, axis=0)
        return x - self.mean[...]


class Largest(nnx.Module):
    """Keeps a statistic that is no average."""

    def __init__(self, rngs):
        self.largest = nnx.BatchStat(jnp.zeros(FEATURES))

    def __call__(self, x, train):
        if train:
            self.largest[...] = jnp.maximum(self.largest[...], jnp.max(x, axis=0))
        return x


class Mixed(nnx.Module):
    """Its statistics move into each other."""

    def __init__(self, rngs):
        self.mean = nnx.BatchStat(jnp.zeros(FEATURES))

    def __call__(self, x, train):
        if train:
            self.mean[...] = 0.9 * self.mean[::-1] + 0.1 * jnp.mean(x, axis=0)
        return x


class Moving(nnx.Module):
    """A layer of one's own, whose update is affine in another way, and a count."""

    def __init__(self, rngs, counts=False):
        self.mean = nnx.BatchStat(jnp.zeros(FEATURES))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32)) if counts else None

    def __call__(self, x, train):
        mean = jnp.mean(x, axis=0)
        if train:
            self.mean[...] += jax.jit(lambda old: 0.25 * jax.lax.stop_gradient(mean - old))(
                self.mean[...]
            )
            if self.calls is not None:
                self.calls[...] += 1
        return x - mean


class Counter(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Dict(calls=nnx.Cache(jnp.zeros(())))

    def __call__(self, x):
        self.inner["calls"][...] += 1
        return x


class Keeps(nnx.Module):
    def __init__(self, rngs):
        pass

    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return x


class FixedNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x)


class LinenCache(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("cache", "calls", jnp.zeros, ()).value += 1
        return x


class AlwaysDrops(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


class Named(nn.Module):
    @nn.compact
    def __call__(self, image, train, mask=None):
        return nn.Dense(2)(image)


def one_norm(**options):
    return lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs, **options)


REFUSED = {
    "spectral norm": (
        from_linen(SpectralLinen(), squares),
        ["batch_stats", "kernel/u", "GhostNorm"],
    ),
    "batch renorm": (from_nnx(Renorm, squares), ["batch_stats.mean", "affine", "GhostNorm"]),
    "maximum": (from_nnx(Largest, squares), ["largest", "affine", "GhostNorm"]),
    "mixture": (from_nnx(Mixed, squares), ["batch_stats.mean", "affine", "GhostNorm"]),
    "whole numbers": (from_nnx(functools.partial(Moving, counts=True), squares), ["calls"]),
    "frozen norm": (
        from_linen(FixedNorm(), squares),
        ["batch_stats", "frozen"],
    ),
    "axis name, nnx": (from_nnx(one_norm(axis_name="data"), squares), ["axis_name", "GhostNorm"]),
    "axis name, linen": (
        from_linen(nn.BatchNorm(axis_name="data"), squares),
        ["axis_name", "GhostNorm"],
    ),
    "cache, nnx": (from_nnx(Counter, squares), ["inner.calls"]),
    "intermediate, nnx": (from_nnx(Keeps, squares), ["seen"]),
    "cache, linen": (from_linen(LinenCache(), squares), ["collection cache"]),
    "random in evaluation": (from_linen(AlwaysDrops(), squares), ["AlwaysDrops", "evaluation"]),
    "no entry": (from_linen(Named(), squares), ["inputs.image", "weight, x", "Named.__call__"]),
    "wrong entry": (from_linen(Named(), squares, inputs={"image": "y"}), ["inputs.image", "'y'"]),
    "wrong shape": (
        from_nnx(lambda rngs: nnx.Linear(7, 2, rngs=rngs), squares, inputs={"inputs": "x"}),
        ["TypeError", "dot_general"],
    ),
    "unknown frozen": (
        from_linen(Named(), squares, inputs={"image": "x"}, frozen={"Dense_1": {"bias": 0}}),
        ["frozen", "params.Dense_1.bias"],
    ),
}


def test_layers_of_ones_own_may_have_running_statistics():
    task = made(from_nnx(Moving, squares))
    assert task.running_decay == {"batch_stats": {"mean": 0.75}}
    x = batches(1, 2 * GHOST)[0]
    _, found = apply(task, *task.init(jax.random.key(0)), masked(examples_of(x)), True)
    assert_close(found["batch_stats"]["mean"], x.reshape(2, GHOST, FEATURES).mean(1))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_sentence(name):
    task, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        made(task)
    for word in words:
        assert word in str(error.value)


def test_a_model_that_cannot_be_made_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="no_such_thing"):
        from_nnx(lambda rngs: rngs.params.no_such_thing, squares)
    with pytest.raises(UserError, match="frozen: given 'backbone'"):
        from_nnx(NnxNet, squares, frozen="backbone")


def test_entries_and_modes_reach_the_parameters_of_their_names():
    class Told(nn.Module):
        @nn.compact
        def __call__(self, image, mask, training, use_running_average, weight=None, absent=5.0):
            self.param("unused", nn.initializers.zeros_init(), ())
            modes = 2.0 * training + use_running_average
            return image[:, :1] + mask[:, None] + weight[:, None] + modes + absent

    task = made(
        from_linen(Told(), squares, inputs={"image": "x", "mask": "m"}),
        {"m": jax.ShapeDtypeStruct((GHOST,), np.float32)},
    )
    examples = examples_of(np.zeros((GHOST, FEATURES), np.float32))
    examples |= {"m": np.full(GHOST, 10.0, np.float32)}
    for train, expected in ((True, 18), (False, 17)):
        outputs, _ = apply(task, {"unused": 0.0}, {}, masked(examples), train)
        np.testing.assert_array_equal(outputs, expected)


def test_an_nnx_filter_freezes_what_make_model_gives():
    pretrained = jnp.arange(FEATURES * 500, dtype=jnp.float32).reshape(FEATURES, 500) / 1000

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.backbone = nnx.Dict(
                linear=nnx.Linear(FEATURES, 500, rngs=rngs), norm=nnx.BatchNorm(500, rngs=rngs)
            )
            self.backbone["linear"].kernel[...] = pretrained * 2 / 2
            self.table = nnx.Variable(jnp.full(500, 3.0))
            self.head = nnx.Linear(500, 2, rngs=rngs)

        def __call__(self, x):
            features = self.backbone["norm"](self.backbone["linear"](x), use_running_average=True)
            return self.head(features + self.table[...])

    task = made(from_nnx(Net, squares, frozen=nnx.PathContains("backbone")))
    init = jax.jit(task.init)
    params, running = init(jax.random.key(0))
    assert set(params) == {"head"}
    assert running == {}
    assert task.shares_ghost_batches
    np.testing.assert_array_equal(task.frozen["backbone"]["linear"]["kernel"], pretrained)
    text = init.lower(jax.random.key(0)).as_text()
    assert "500x2" in text
    assert f"{FEATURES}x500" not in text
    x = batches(1, 2 * GHOST)[0]
    features = np.float64(x) @ np.float64(pretrained) / np.sqrt(1 + 1e-5) + 3.0
    outputs = features @ np.float64(params["head"]["kernel"])
    found, _ = apply(task, params, running, masked(examples_of(x)), True, task.frozen)
    assert_close(found, outputs, rtol=1e-5, atol=1e-5)


def test_a_part_of_linen_variables_can_be_frozen():
    module = LinenNet()
    x = batches(1, GHOST)[0]
    linear = {"kernel": jnp.ones((FEATURES, 4)), "bias": jnp.full(4, 2.0)}
    task = made(from_linen(module, squares, frozen={"linear": linear}))
    params, running = jax.jit(task.init)(jax.random.key(0))
    assert set(params) == {"first", "second"}
    assert task.frozen == {"params": {"linear": linear}}
    given = {"params": {**params, "linear": linear}, **running}
    in_training = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    expected, _ = jax.jit(in_training)(given, x)
    outputs, _ = apply(task, params, running, masked(examples_of(x)), True, task.frozen)
    assert_close(outputs, expected)

    # A pretrained norm that never moves.
    stats = {"mean": jnp.full(FEATURES, 1.0), "var": jnp.full(FEATURES, 4.0)}
    frozen = {"params": {}, "batch_stats": {"BatchNorm_0": stats}}
    task = made(from_linen(FixedNorm(), squares, frozen=frozen))
    params, running = jax.jit(task.init)(jax.random.key(0))
    assert running == {}
    outputs, _ = apply(task, params, running, masked(examples_of(x)), True, task.frozen)
    assert_close(outputs, (x - 1) / 2, atol=1e-4)


def test_parameters_keep_their_dtypes():
    def make_model(rngs):
        return nnx.Sequential(
            nnx.Linear(FEATURES, 4, rngs=rngs, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16),
            nnx.BatchNorm(4, rngs=rngs, dtype=jnp.bfloat16, momentum=0.5),
        )

    task = made(from_nnx(make_model, squares, inputs={"inputs": "x"}))
    params, running = jax.eval_shape(task.init, jax.random.key(0))
    assert params["layers"][0]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(running)} == {jnp.dtype("float32")}
    assert set(jax.tree.leaves(task.running_decay)) == {0.5}
    examples = masked(examples_of(batches(1, 2 * GHOST)[0]))
    in_training = functools.partial(task.apply, train=True)
    outputs, statistics = jax.eval_shape(in_training, params, running, examples)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.shape for leaf in jax.tree.leaves(statistics)} == {(2, 4)}


class WithGhostNorm(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = GhostNorm(GHOST, axis_name=functions.DATA_AXIS)(x, train=train)
        return nn.Dropout(self.rate, deterministic=not train)(x)


def test_ghost_norm_forms_ghost_batches_by_itself():
    task, dropping = (made(from_linen(WithGhostNorm(rate), squares)) for rate in (0, 0.5))
    assert (task.shares_ghost_batches, task.takes_keys) == (True, False)
    assert (dropping.shares_ghost_batches, dropping.takes_keys) == (False, True)
    assert set(jax.tree.leaves(task.running_decay)) == {0.9}
    params, running = jax.jit(task.init)(jax.random.key(0))
    examples = masked(examples_of(batches(1, 4 * GHOST)[0]))
    outputs, statistics = apply(task, params, running, examples, True)
    dense = examples["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    dense = np.asarray(dense, np.float64).reshape(4, GHOST, 4)
    mean, variance = dense.mean(1, keepdims=True), dense.var(1, keepdims=True)
    expected = ((dense - mean) / np.sqrt(variance + 1e-5)).reshape(outputs.shape)
    (found,) = statistics["running_statistics"].values()
    assert_close(found, {"mean": mean[:, 0], "variance": variance[:, 0]}, rtol=1e-5)
    assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    # Called for each ghost batch by itself it leaves the same.
    dropped, by_ghost = apply(dropping, params, running, examples, True)
    assert_close(by_ghost, statistics)
    assert_close(dropped, np.where(dropped == 0, 0, 2 * expected), rtol=1e-5, atol=1e-5)


def test_equal_shapes_give_the_same_task():
    task = Task.from_nnx(NnxDropout, squares, metrics={"error": "loss"})
    assert made(task) is made(task)
    assert made(task) is not made(task, ghost=4)
    assert made(task).metrics == {"error": "loss"}
    assert made(Task.from_linen(LinenDropout(), squares, minimised="other")).minimised == "other"
