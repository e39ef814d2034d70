"""A task of a few arrays, its gradients by JAX alone, and optimizers of anyone's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from bigbatch.engine import functions
from bigbatch.engine.accumulator import shapes_of
from bigbatch.engine.layers import whole
from bigbatch.engine.parts import Parts
from bigbatch.engine.task import Task
from bigbatch.engine.update_rule import resolve

UPDATES = 6
EXAMPLES = 16
# Arrays of several ranks, none but one of a length that 4 devices divide.
SHAPES = {"kernel": (3, 7), "bias": (7,), "square": (8, 8), "scalar": ()}
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(UPDATES, EXAMPLES, 3))
TARGETS = RNG.normal(size=(UPDATES, EXAMPLES))
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
# The learning rate changes in the middle of the run; `bias_rate` is a column of the user's own.
PLAN = {
    "learning_rate": np.where(np.arange(UPDATES) < 3, 0.05, 0.02),
    "momentum": np.zeros(UPDATES),
}
TWO_RATES = PLAN | {"bias_rate": np.where(np.arange(UPDATES) < 2, 0.01, 0.03)}


def empty_accumulator(task, state, examples, mesh, shard="none"):
    parts = Parts(mesh, shard).of_calls
    shapes = shapes_of(task, state.params, state.running_statistics, examples, parts)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shapes)


def outputs(params, x):
    params = {name: whole(param, SHAPES[name]) for name, param in params.items()}
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    hidden = jnp.pad(hidden, ((0, 0), (0, 1))) @ params["square"]
    return jnp.sum(hidden, axis=1) * params["scalar"]


# They run a few times only: what is quick to compile is quick.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
@jax.grad
def gradient(params, x, y):
    """Of the mean loss."""
    return jnp.mean((outputs(params, x) - y) ** 2)


def loss(predicted, examples):
    weight = examples["weight"].astype(predicted.dtype)
    return {"loss": weight @ (predicted - examples["y"]) ** 2, "count": jnp.sum(weight)}


def task(dtype=jnp.float64):
    params = {name: jnp.asarray(value, dtype) for name, value in PARAMS.items()}
    apply = lambda params, statistics, examples, train: (outputs(params, examples["x"]), {})  # noqa: E731
    return Task(init=lambda key: (params, {}), apply=apply, loss=loss)


def clipped(learning_rate):
    return optax.chain(
        optax.clip(2.0), optax.clip_by_global_norm(0.3), optax.rmsprop(learning_rate)
    )


def two_rates(learning_rate, bias_rate):
    groups = {"weights": optax.adam(learning_rate), "bias": optax.sgd(bias_rate)}
    return optax.multi_transform(
        groups, {name: "bias" if name == "bias" else "weights" for name in SHAPES}
    )


def adafactor(learning_rate):
    """Factored in spite of the small arrays."""
    return optax.adafactor(learning_rate, min_dim_size_to_factor=2)


def with_noise(learning_rate):
    """With a random key in its state."""
    return optax.chain(optax.add_noise(0.01, 0.55, 0), optax.sgd(learning_rate))


# Name -> (the plan, an optimizer as `resolve` takes it, the same of plain Optax at some rates).
OWN = {
    "lion": (PLAN, optax.lion, lambda h: optax.lion(h["learning_rate"])),
    "muon": (
        PLAN,
        lambda learning_rate: contrib.muon(learning_rate),
        lambda h: contrib.muon(h["learning_rate"]),
    ),
    "adafactor": (PLAN, adafactor, lambda h: adafactor(h["learning_rate"])),
    "adafactor, not factored": (
        PLAN,
        lambda learning_rate: optax.adafactor(learning_rate),
        lambda h: optax.adafactor(h["learning_rate"]),
    ),
    "schedule_free_sgd": (
        PLAN,
        contrib.schedule_free_sgd,
        lambda h: contrib.schedule_free_sgd(h["learning_rate"]),
    ),
    "schedule_free_adamw": (
        PLAN,
        lambda learning_rate, b1=0.8: contrib.schedule_free_adamw(learning_rate, b1=b1),
        lambda h: contrib.schedule_free_adamw(h["learning_rate"], b1=0.8),
    ),
    "clip and chain": (PLAN, clipped, lambda h: clipped(h["learning_rate"])),
    "two rates": (TWO_RATES, two_rates, lambda h: two_rates(h["learning_rate"], h["bias_rate"])),
    "finished": (
        PLAN,
        optax.chain(
            optax.clip_by_global_norm(0.5),
            # Whole numbers, which the plan turns into fractions.
            optax.inject_hyperparams(optax.sgd)(learning_rate=1, momentum=1, nesterov=True),
        ),
        lambda h: optax.chain(
            optax.clip_by_global_norm(0.5), optax.sgd(h["learning_rate"], 0.0, nesterov=True)
        ),
    ),
    "random noise": (PLAN, with_noise, lambda h: with_noise(h["learning_rate"])),
    "every second update": (
        PLAN,
        lambda learning_rate: optax.MultiSteps(
            optax.adam(learning_rate), 2
        ).gradient_transformation(),
        lambda h: optax.MultiSteps(optax.adam(h["learning_rate"]), 2).gradient_transformation(),
    ),
}


def rule_of(optimizer, plan=PLAN, dtype=np.float64, **options):
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}
    return resolve(optimizer, plan, shapes, **options)


def trained(rule, plan=PLAN, *, devices=1, shard="none", dtype=jnp.float64, updates=UPDATES):
    """The state after the updates, and the sums of the last, under the two compiled functions.

    With `shard` "update", or `Layers`, the state lies in parts.
    """
    mesh = functions.data_mesh(jax.devices()[:devices])
    parts = Parts(mesh, shard)

    def begin(key):
        return functions.with_copy(functions.init_state(task(dtype), rule, key), task(dtype), parts)

    key = jax.random.key(0)
    where = functions.shardings(jax.eval_shape(begin, key), parts)
    state = jit(begin, out_shardings=where)(key)
    accumulate = jit(
        functools.partial(functions.accumulate, task=task(dtype), mesh=mesh, shard=shard)
    )
    apply_update = jit(
        functools.partial(
            functions.apply_update, task=task(dtype), optimizer=rule, mesh=mesh, shard=shard
        )
    )
    accumulator = None
    for update in range(updates):
        examples = {
            "x": INPUTS[update].astype(dtype),
            "y": TARGETS[update].astype(dtype),
            "weight": np.ones(EXAMPLES),
            "ghost_mask": np.ones(4),
        }
        if accumulator is None:
            accumulator = empty_accumulator(task(dtype), state, examples, mesh, shard)
        examples = jax.device_put(examples, jax.NamedSharding(mesh, functions.SHARDED))
        accumulator = accumulate(state, accumulator, examples)
        hyper = {name: np.asarray(plan[name][update]) for name in rule.hyper_names}
        state, accumulator, sums = apply_update(state, accumulator, hyper)
    # One program for all values; the first call's arrays are not yet its own results.
    assert apply_update._cache_size() <= 2
    return state, sums


def by_optax(make, plan):
    """Parameters and state of the plain transformation, made anew for every update."""
    params, state = jax.tree.map(jnp.asarray, PARAMS), None

    @jit
    def updated(gradients, state, params, hyper):
        changes, state = make(hyper).update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    for update in range(UPDATES):
        hyper = {name: column[update] for name, column in plan.items()}
        state = make(hyper).init(params) if state is None else state
        gradients = gradient(params, INPUTS[update], TARGETS[update])
        params, state = updated(gradients, state, params, hyper)
    return params, state


def assert_close(found, expected, tolerance=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=str(path))
