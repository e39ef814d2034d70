"""After the first update of a run nothing is traced and nothing is compiled."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigbatch.layout import layout
from bigbatch.training import loop as train
from bigbatch.training.programs import compiler_options
from tests import trained
from tests.test_adaptive import ADAPTIVE, FIELDS

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
}
# Records, evaluations and checkpoints, on unlike updates.
OFTEN = {
    "log_every_updates": 3,
    "evaluate_every_updates": 4,
    "checkpoint_every_updates": 5,
}
ON_DEVICE = {"data": {"name": "digits", "on_device": True}, "noise_small_batch_examples": 32}
RUNS = [
    pytest.param(ON_DEVICE, id="planned"),
    pytest.param(FIELDS | {"policy": ADAPTIVE}, id="adaptive"),
    pytest.param({"reproducible": True}, id="reproducible", marks=pytest.mark.long),
    pytest.param({"shard": "update"}, id="sharded", marks=pytest.mark.long),
]


@pytest.fixture
def seen():
    """What JAX reports of tracing and compiling, by event and function; not what it remembers."""
    counts: collections.Counter = collections.Counter()

    def listen(event, duration, fun_name="", **rest):
        if event in EVENTS:
            counts[event, fun_name] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("changes", RUNS)
def test_nothing_is_traced_or_compiled_after_the_first_update(seen, changes, tmp_path, monkeypatch):
    # As many shapes of microbatch as there may be.
    monkeypatch.setattr(layout, "COMPILATION_EXAMPLES", 0)
    original, sizes = train.updates, []

    def watched(*arguments):
        for row, state, sums in original(*arguments):
            if row.update == 0:
                seen.clear()
            sizes.append(row.batch_size)
            yield row, state, sums

    monkeypatch.setattr(train, "updates", watched)
    trained.train(trained.prepared(trained.quick(**changes | OFTEN), 2), tmp_path)
    assert len(set(sizes)) > 1
    assert not seen
    # What there is would have been seen.
    jax.jit(lambda x: x + 1)(1.0)
    assert {event for event, _ in seen} == EVENTS


def test_what_the_compiler_of_gpus_is_told(monkeypatch):
    """All of it; not of large scattered sums; and what the user's flags name is left to them."""

    def options(function, *shape):
        x = jax.ShapeDtypeStruct(shape, np.float32)
        return list(compiler_options("", jax.jit(function).lower(x).as_text(), "gpu", False))

    def pool(x):
        return jnp.sum(nn.max_pool(x, (3, 3), (2, 2)))

    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    combine, exclude = options(pool, 32, 224, 224, 3)
    assert options(jax.grad(pool), 2, 224, 224, 3) == [combine, exclude]
    assert options(jax.grad(pool), 32, 224, 224, 3) == [combine]
    taken = jax.grad(lambda x: jnp.sum(x[jnp.arange(2048) % 7]))
    assert options(taken, 7, 512) == [combine, exclude]
    assert options(taken, 7, 513) == [combine]
    monkeypatch.setenv("XLA_FLAGS", f"--{combine}=1 --xla_dump_to=texts")
    assert options(pool, 2, 8, 8, 3) == [exclude]
