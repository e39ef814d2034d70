"""What the host holds while a state in parts is read and written: an array, never all of them."""

import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bigbatch.commands import saved
from bigbatch.engine import functions
from bigbatch.engine.functions import State
from bigbatch.engine.parts import Parts
from bigbatch.errors import UserError
from bigbatch.training.run import Run
from bigbatch.workdir import checkpoint, network_file, packing
from bigbatch.workdir.checkpoint import Checkpoints

# They are cut along the second axis: on a CPU a device may keep rows of a host's array as they are.
ARRAYS, SHAPE = 16, (256, 1024)
ARRAY_BYTES = 4 * 256 * 1024
# One that is read or written, one that JAX has not let go of yet, and buffers.
MOST = 3


@pytest.fixture(scope="module")
def values() -> list[np.ndarray]:
    return [np.full(SHAPE, number, np.float32) for number in range(ARRAYS)]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(functions.data_mesh(), "update")


def state_of(params) -> State:
    return State({f"{number:02}": array for number, array in enumerate(params)}, {}, {})


def shapes(parts: Parts) -> State:
    """Of a state in parts on all devices."""
    where = jax.NamedSharding(parts.mesh, parts.spec(SHAPE))
    return state_of([jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=where)] * ARRAYS)


def run_of(parts: Parts, initial=None) -> SimpleNamespace:
    """What of a run is asked here."""
    begun = lambda params, statistics: State(params, statistics, {})  # noqa: E731
    programs = SimpleNamespace(state_shapes=shapes(parts), state_from=begun)
    optimizer = SimpleNamespace(evaluation_params=lambda state, params: params)
    return SimpleNamespace(
        programs=programs, saved_shapes=shapes(parts), initial=initial, optimizer=optimizer
    )


def held(function):
    """What a function gives, and the most bytes that it and NumPy held on the host, in arrays."""
    tracemalloc.start()
    try:
        found = function()
        return found, tracemalloc.get_traced_memory()[1] / ARRAY_BYTES
    finally:
        tracemalloc.stop()


def assert_is(state: State, values: list[np.ndarray]) -> None:
    assert packing.in_parts(state)
    assert all(
        leaf.addressable_shards[0].data.nbytes * 8 == leaf.nbytes for leaf in state.params.values()
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, state_of(values).params)


def test_a_network_is_exported_and_begun_with(values, parts, tmp_path, monkeypatch):
    state = jax.tree.map(
        lambda a, to: jax.device_put(a, to.sharding), state_of(values), shapes(parts)
    )
    monkeypatch.setattr(saved, "newest", lambda run, directory, update: (state, 1))
    out = tmp_path / "network.npz"
    said, arrays = held(lambda: saved.export(run_of(parts), tmp_path, out))
    assert arrays < MOST
    with np.load(out) as file:
        assert said == {
            "updates": 1,
            "arrays": ARRAYS,
            "params_sha256": packing.sha256(state_of(values).params),
        }
        for name, value in state_of(values).params.items():
            np.testing.assert_array_equal(file[f"params/{name}"], value)
    like = network_file.Network(*shapes(parts)[:2])
    run = run_of(parts, lambda: network_file.read(str(out), like))
    begun, arrays = held(lambda: Run.first_state(run))
    assert arrays < MOST
    assert_is(begun, values)


def test_a_checkpoint_of_whole_arrays_is_read_into_parts(values, parts, tmp_path, monkeypatch):
    """In pieces that are no array's own, some of them at once."""
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", ARRAY_BYTES * 2 // 3)
    monkeypatch.setattr(checkpoint, "_READ_BYTES", ARRAY_BYTES)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state_of(values), {"run": "this"})
    with Checkpoints(tmp_path) as checkpoints:
        run = run_of(parts)
        read = lambda: Run.on_devices(run, checkpoints.restore(shapes(parts)).state)  # noqa: E731
        state, arrays = held(read)
    assert arrays < MOST
    assert_is(state, values)


def test_a_file_that_is_replaced_before_an_array_is_read_is_a_mistake(tmp_path):
    file = tmp_path / "network.npz"
    zeros, ones = (network_file.Network({"a": fill(3)}, {}) for fill in (np.zeros, np.ones))
    network_file.write(file, zeros)
    read = network_file.read(str(file), zeros)
    np.testing.assert_array_equal(read.params["a"], np.zeros(3))
    network_file.write(file, ones)
    with pytest.raises(UserError, match=r"an npz file that can be read \(BadZipFile"):
        np.asarray(read.params["a"])
