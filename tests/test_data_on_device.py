"""Microbatches made on the devices are those made on the host, bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigbatch.data import augment, sets
from bigbatch.data.augment import Augment
from bigbatch.engine import functions as step
from bigbatch.layout.layout import Layout
from bigbatch.training import microbatches
from tests import trained


@pytest.mark.parametrize(
    "change", [Augment(), Augment(True, 0), Augment(False, 2), Augment(True, 3)]
)
@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1)])
def test_images_are_changed_as_on_the_host(change, shape):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (64, *shape), dtype=np.uint8)
    bits = tuple(rng.integers(0, 2**32, (2, 64), dtype=np.uint32))
    expected = augment.apply(change, images, bits)
    changed = jax.jit(augment.apply_on_device, static_argnums=0)(change, images, bits)
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_microbatches_equal_those_of_the_host(devices):
    """Batch sizes that change, cross epochs and pass the data set's size; masked ghost batches."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (50, 6, 5, 2), dtype=np.uint8)
    labels = rng.integers(1, 9, 50, dtype=np.int32)
    data = dataclasses.replace(
        sets.from_arrays(images, labels, images, labels), augment=Augment(flip=True, pad_pixels=2)
    )
    layout = Layout(ghost_batch_examples=4, devices=devices, shapes=(16, 4))
    mesh = step.data_mesh(jax.devices()[:devices])
    on_host, there = (
        microbatches.of(held, layout, mesh, seed=3, ghost_batch_examples=4, takes_keys=False)
        for held in (data, dataclasses.replace(data, keep_on_device=True))
    )
    position = 50 * 2**32 - 1_000
    for batch_size in (4, 124, 40, 232, 8):
        for part in layout.microbatches(batch_size):
            request = microbatches.Request(position + part.offset_examples, part)
            (size, expected), (made_size, made) = on_host(request), there(request)
            assert size == made_size
            assert made.keys() == expected.keys()
            for name, array in expected.items():
                assert made[name].sharding == NamedSharding(mesh, step.SHARDED)
                assert made[name].dtype == array.dtype
                np.testing.assert_array_equal(made[name], array)
        position += batch_size


def test_a_run_with_its_data_on_the_device_has_the_same_microbatches():
    """Through the config; with random keys beside the images."""
    model = {"name": "wide_resnet", "depth": 10, "width": 1, "strides": [2, 2, 1]}
    data = {"name": "digits", "flip": True, "pad_pixels": 1}
    runs = [
        trained.prepared(
            trained.config(data=data | {"on_device": there}, model=model | {"dropout_rate": 0.1}),
            devices=2,
        )
        for there in (False, True)
    ]
    plan = runs[0].plan
    requests = microbatches.requests(plan, runs[0].layout, 0, plan.num_updates)
    for request in list(requests)[::7]:
        (size, expected), (_, made) = (run.microbatch(request) for run in runs)
        assert {"image", "label", "key", "weight", "ghost_mask"} == made.keys()
        assert len(made["image"]) == size
        for name, array in expected.items():
            np.testing.assert_array_equal(made[name], array)


def test_the_program_that_makes_a_microbatch_has_no_collective():
    data = sets.load("digits", flip=True, pad_pixels=1, on_device=True)
    mesh = step.data_mesh(jax.devices()[:4])
    layout = Layout(ghost_batch_examples=8, devices=4, shapes=(8,))
    texts = []
    compiled = jax.stages.Lowered.compile

    def spy(lowered, *arguments):
        program = compiled(lowered, *arguments)
        texts.append(program.as_text())
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", spy)
        microbatches.of(data, layout, mesh, 0, 8, takes_keys=False)
    (text,) = texts
    assert "gather" in text
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
