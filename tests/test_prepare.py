"""What `prepare` refuses before anything is compiled, each in a sentence that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bigbatch as bb
from bigbatch.engine.functions import data_mesh
from bigbatch.errors import UserError
from bigbatch.training import prepare as prepare_lib
from tests.own import linen_batch_norm, nnx_grain, optimizers, regression

DEVICES = np.array(jax.devices())


def sharded(spec):
    return NamedSharding(Mesh(DEVICES[:3], ("data",)), PartitionSpec(*spec))


@pytest.fixture(autouse=True)
def no_programs(monkeypatch):
    def compiled(*arguments, **options):
        raise AssertionError("compiled before it was checked")

    monkeypatch.setattr(prepare_lib, "compile_programs", compiled)


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (
            regression.prepare,
            {"mesh": Mesh(DEVICES.reshape(2, 4), ("data", "model"))},
            "mesh: given ('data', 'model'); nearest: ('data',); allowed: a mesh of the one axis",
        ),
        (
            regression.prepare,
            {"mesh": Mesh(DEVICES, ("batch",))},
            "mesh: given ('batch',); nearest: ('data',); allowed: a mesh of the one axis 'data'",
        ),
        (
            regression.prepare,
            {"initial": ({"w": jax.device_put(jnp.zeros(3), sharded(["data"]))}, {})},
            "('data',); allowed: a whole array on every device with shard 'none'",
        ),
        (
            regression.prepare,
            {"initial": ({"w": np.zeros(4)}, {})},
            "initial[0]['w']: given (4,); allowed: (3,)",
        ),
        (
            regression.prepare,
            {"initial": {"w": np.zeros(3)}},
            "allowed: (parameters, running statistics) as the task's init gives them",
        ),
        (
            nnx_grain.prepare,
            {"ghost_batch_examples": None},
            "ghost_batch_examples: given None; allowed: how many examples share statistics",
        ),
        (
            linen_batch_norm.prepare,
            {"microbatch_examples_per_device": 4, "mesh": data_mesh(list(DEVICES[:4]))},
            "microbatch_examples_per_device: given 4; nearest: 16; allowed: a multiple of "
            "ghost_batch_examples = 16: this task forms its statistics or random numbers on one "
            "device. Devices share a ghost batch with bigbatch.GhostNorm",
        ),
        (
            regression.prepare,
            {"shard": True},
            "shard: given True; nearest: 'auto'; allowed: 'auto', 'none', 'update', ",
        ),
        (
            optimizers.prepare,
            {"reproducible": True, "shard": "update"},
            "of arrays in parts would add in the order of the parts",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(prepare, options, words):
    with pytest.raises(UserError) as caught:
        prepare(**options)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_data_of_another_length_than_the_plans_are_a_mistake():
    plan = bb.make_plan(bb.constant(0.1, 8, 0.9), train_examples=100, epochs=1)
    task = bb.Task(lambda key: (jnp.zeros(3), {}), lambda p, s, e, t: (e["x"] @ p, {}), None)
    options = {"microbatch_examples_per_device": 8}
    with pytest.raises(UserError, match="given 99; allowed: the 100 training examples"):
        bb.prepare(task, {"x": np.zeros((99, 3))}, plan, bb.Momentum(), **options)


def test_a_directory_of_version_0_1_is_refused_with_a_way_out(tmp_path, monkeypatch):
    from bigbatch.workdir import resume
    from bigbatch.workdir.files import Workdir

    (tmp_path / "config.json").write_text('{"experiment": "decay"}')
    (tmp_path / "plan.json").write_text("{}")
    plan = bb.make_plan(bb.constant(0.1, 8, 0.9), train_examples=100, epochs=1)
    with pytest.raises(UserError, match=r"begun by an older bigbatch.*initial_params") as caught:
        resume.open_run(Workdir(tmp_path), {"seed": 0}, plan, record={})
    assert caught.value.problems[0].field == "workdir"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "plan.json"]
