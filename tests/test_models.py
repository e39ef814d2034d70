"""The networks: sizes, and equality with independent implementations of the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigbatch.errors import UserError
from bigbatch.models import MODELS, InceptionResNetV2Config, ResNetConfig, WideResNetConfig
from bigbatch.models.ghost_norm import GHOST_STATISTICS, RUNNING_STATISTICS
from tests import keras_models

WRN_16_4 = WideResNetConfig(depth=16, width=4)


def shapes_of(module, image_shape):
    """Our `params` and `running_statistics` as shapes."""
    ghost = jax.ShapeDtypeStruct((module.ghost_batch_examples, *image_shape), jnp.float32)
    init = functools.partial(module.init, train=True)
    variables = jax.eval_shape(init, jax.random.key(0), ghost)
    return variables["params"], variables[RUNNING_STATISTICS]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("config", "image_shape", "num_classes", "trainable", "running"),
    [
        # Zagoruyko and Komodakis 2016, table 4 has 2.7M.
        (WRN_16_4, (32, 32, 3), 10, 2_748_890, 3_616),
        (ResNetConfig(depth=18), (224, 224, 3), 1000, 11_689_512, 9_600),
        (ResNetConfig(depth=50), (224, 224, 3), 1000, 25_557_032, 53_120),
        (InceptionResNetV2Config(), (299, 299, 3), 1000, 55_813_192, 60_544),
    ],
)
def test_parameter_counts(config, image_shape, num_classes, trainable, running):
    module = config.module(num_classes=num_classes, ghost_batch_examples=2)
    params, statistics = shapes_of(module, image_shape)
    assert (size(params), size(statistics)) == (trainable, running)


@pytest.fixture(scope="module")
def keras():
    return keras_models.import_keras()


def evaluate(module, variables, images):
    apply = jax.jit(functools.partial(module.apply, train=False))
    return np.asarray(apply(variables, images))


def assert_relatively_close(actual, expected, tolerance):
    """The largest difference, relative to the largest value."""
    assert np.ptp(expected) > 0.1
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


def images_of(num_examples, image_shape, dtype=np.float32):
    return np.random.default_rng(5).normal(size=(num_examples, *image_shape)).astype(dtype)


@pytest.mark.parametrize(
    ("config", "pixels"),
    [
        (ResNetConfig(depth=50), 64),
        pytest.param(ResNetConfig(depth=50), 224, marks=pytest.mark.long),
        (WRN_16_4, 32),
    ],
)
def test_forward_equals_keras(keras, config, pixels):
    image_shape = (pixels, pixels, 3)
    module = config.module(num_classes=100, ghost_batch_examples=2)
    params, statistics = keras_models.random_variables(shapes_of(module, image_shape), seed=1)
    if isinstance(config, ResNetConfig):
        model = keras_models.resnet_50(keras, image_shape, 100)
    else:
        model = keras_models.wide_resnet(keras, 16, 4, image_shape, 100)
    keras_models.copy_by_name(model, params, statistics)
    images = images_of(2, image_shape)
    ours = evaluate(module, {"params": params, RUNNING_STATISTICS: statistics}, images)
    assert_relatively_close(ours, model(images, training=False).numpy(), 1e-4)


def convolved(x, kernel, stride=1):
    """PyTorch's `conv2d` of [N, I, H, W] with [O, I, k, k], padding k // 2, written out."""
    size = kernel.shape[-1]
    edges = (size // 2, size // 2)
    padded = np.pad(x, ((0, 0), (0, 0), edges, edges))
    height, width = ((side - 1) // stride + 1 for side in x.shape[2:])
    out = np.empty((len(x), len(kernel), height, width))
    for i, j in np.ndindex(height, width):
        rows, columns = (slice(at * stride, at * stride + size) for at in (i, j))
        out[:, :, i, j] = np.einsum("nchw,ochw->no", padded[:, :, rows, columns], kernel)
    return out


def wide_resnet_10_in_torch_order(params, statistics, images, strides):
    """The logits of WRN-10 by loops, its weights and images laid out as its authors' are."""

    def conv(x, name, stride=1):
        return convolved(x, params[name]["kernel"].transpose(3, 2, 0, 1), stride)

    def activated(x, name):
        mean, variance = statistics[name]["mean"], statistics[name]["variance"]
        factor = params[name]["scale"] / np.sqrt(variance + 1e-5)
        shifted = x - mean[:, None, None]
        return np.maximum(shifted * factor[:, None, None] + params[name]["bias"][:, None, None], 0)

    x = conv(images.transpose(0, 3, 1, 2), "stem")
    for group, stride in enumerate(strides):
        name = f"group{group}_block0"
        y = activated(x, f"{name}_norm1")
        if f"{name}_shortcut" in params:
            x = conv(y, f"{name}_shortcut", stride)
        y = activated(conv(y, f"{name}_conv1", stride), f"{name}_norm2")
        x = x + conv(y, f"{name}_conv2")
    pooled = activated(x, "norm").mean(axis=(2, 3))
    return pooled @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.parametrize(("strides", "width"), [((1, 2, 2), 2), ((2, 1, 1), 1)])
def test_wide_resnet_equals_loops_in_the_order_of_torch(strides, width):
    """Even sides, where the padding of a stride of 2 can be at the end."""
    image_shape = (12, 8, 3)
    with jax.enable_x64(True):
        config = WideResNetConfig(depth=10, width=width, strides=strides, dtype="float64")
        module = config.module(num_classes=7, ghost_batch_examples=2)
        params, statistics = keras_models.random_variables(shapes_of(module, image_shape), seed=4)
        images = images_of(2, image_shape, np.float64)
        ours = evaluate(module, {"params": params, RUNNING_STATISTICS: statistics}, images)
    expected = wide_resnet_10_in_torch_order(params, statistics, images, strides)
    assert_relatively_close(ours, expected, 1e-12)


def called_convs(module, image_shape):
    """The names of the convolutions in the order in which they are called."""
    names = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            names.append(context.module.name)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(module, image_shape)
    return names


@pytest.mark.parametrize("pixels", [75, pytest.param(299, marks=pytest.mark.long)])
def test_inception_resnet_v2_equals_keras_applications(keras, pixels):
    image_shape = (pixels, pixels, 3)
    module = InceptionResNetV2Config().module(num_classes=100, ghost_batch_examples=2)
    params, statistics = keras_models.random_variables(shapes_of(module, image_shape), seed=2)
    keras.backend.clear_session()
    model = keras.applications.InceptionResNetV2(
        weights=None, input_shape=image_shape, classes=100, classifier_activation=None
    )
    convs = called_convs(module, image_shape)
    keras_models.copy_into_inception_resnet_v2(model, convs, params, statistics)
    images = images_of(2, image_shape)
    ours = evaluate(module, {"params": params, RUNNING_STATISTICS: statistics}, images)
    assert_relatively_close(ours, model(images, training=False).numpy(), 1e-4)


def test_wide_resnet_gradients_equal_keras_in_float64(keras):
    """Two ghost batches: Keras computes them one by one, with batch norm over each."""
    import tensorflow as tf

    image_shape, ghost = (32, 32, 3), 3
    images = images_of(2 * ghost, image_shape, np.float64)
    labels = np.arange(2 * ghost) % 10
    with jax.enable_x64(True):
        config = WideResNetConfig(depth=16, width=4, dtype="float64")
        module = config.module(num_classes=10, ghost_batch_examples=ghost)
        params, statistics = keras_models.random_variables(shapes_of(module, image_shape), seed=3)

        def loss(params):
            logits, updated = module.apply(
                {"params": params, RUNNING_STATISTICS: statistics},
                images,
                train=True,
                mutable=[GHOST_STATISTICS],
            )
            log_softmax = jax.nn.log_softmax(logits)
            return -jnp.sum(log_softmax[jnp.arange(len(labels)), labels]), updated

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (ours, updated), gradients = jax.device_get(compiled(params))

    keras.config.set_dtype_policy("float64")
    try:
        model = keras_models.wide_resnet(keras, 16, 4, image_shape, 10)
    finally:
        keras.config.set_dtype_policy("float32")
    keras_models.copy_by_name(model, params, statistics)
    losses = 0.0
    with tf.GradientTape() as tape:
        for first in (0, ghost):
            part = slice(first, first + ghost)
            logits = model(images[part], training=True)
            cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels[part], logits)
            losses += tf.reduce_sum(cross_entropy)
    np.testing.assert_allclose(ours, losses.numpy(), rtol=1e-10)
    variables = [v.value for v in model.trainable_variables]
    theirs = tape.gradient(losses, variables)
    names = {"gamma": "scale", "beta": "bias"}
    compared = 0
    for variable, gradient in zip(model.trainable_variables, theirs, strict=True):
        layer, kind = variable.path.rsplit("/", 1)
        own = gradients[layer][names.get(kind, kind)]
        scale = np.abs(gradient.numpy()).max()
        np.testing.assert_allclose(own, gradient.numpy(), rtol=0, atol=1e-8 * scale, err_msg=layer)
        compared += own.size
    assert compared == size(params)
    # The first norm layer sees what both compute from the images alone.
    stem = np.asarray(updated[GHOST_STATISTICS]["group0_block0_norm1"]["mean"])
    kernel = params["stem"]["kernel"]
    convolved = tf.nn.conv2d(images, kernel, 1, "SAME").numpy().reshape(2, -1, 16)
    np.testing.assert_allclose(stem, convolved.mean(axis=1), rtol=1e-10, atol=1e-12)


def initial(module, image_shape, kind, layers=None):
    """The initial parameters of one kind by layer; only these are compiled, to be quick."""

    def init(key):
        images = jnp.zeros((module.ghost_batch_examples, *image_shape))
        params = module.init(key, images, train=True)["params"]
        names = layers or [name for name in params if kind in params[name]]
        return {name: params[name][kind] for name in names}

    return jax.jit(init)(jax.random.key(0))


def test_zero_initialised_branches_make_every_block_start_as_the_identity():
    module = ResNetConfig(depth=18).module(num_classes=3, ghost_batch_examples=2)
    scales = initial(module, (32, 32, 3), "scale")
    last = {name for name in scales if name.endswith("block0_norm2") or name.endswith("1_norm2")}
    assert len(last) == 8
    for name, scale in scales.items():
        np.testing.assert_array_equal(scale, 0.0 if name in last else 1.0)


def test_initial_kernels_have_he_variance_by_the_fan_out():
    module = WideResNetConfig(depth=10, width=1).module(num_classes=10, ghost_batch_examples=2)
    kernels = initial(module, (8, 8, 3), "kernel", ["stem", "group2_block0_conv2"])
    for kernel in kernels.values():
        fan_out = np.prod(kernel.shape[:2]) * kernel.shape[-1]
        # The relative error of a variance from n normal samples is sqrt(2/n).
        np.testing.assert_allclose(
            np.var(kernel) * fan_out / 2, 1, rtol=0, atol=5 * np.sqrt(2 / kernel.size)
        )


@pytest.mark.parametrize("name", MODELS.keys() - {"transformer"})
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
    fields = {"wide_resnet": {"depth": 10, "width": 1}, "resnet": {"depth": 18}}.get(name, {})
    config = MODELS[name](dtype="bfloat16", **fields)
    module = config.module(num_classes=3, ghost_batch_examples=2)
    images = jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.float32)
    init = functools.partial(module.init, train=True)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    seen = set()

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            seen.add(result.dtype)
        return result

    with nn.intercept_methods(record):
        logits = jax.eval_shape(functools.partial(module.apply, train=False), variables, images)
    assert seen == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


def test_images_too_small_for_inception_are_refused():
    module = InceptionResNetV2Config().module(num_classes=3, ghost_batch_examples=2)
    with pytest.raises(UserError) as error:
        shapes_of(module, (74, 80, 3))
    assert error.value.problems[0].nearest == (75, 80)


def test_fields_out_of_range_are_named():
    with pytest.raises(UserError) as error:
        WideResNetConfig(depth=15, width=0, strides=(0, 1, 1), dropout_rate=1.0)
    problems = {problem.field: problem.nearest for problem in error.value.problems}
    assert problems == {"depth": 16, "width": 1, "strides": (1, 1, 1), "dropout_rate": 0.999}
