"""Keras models to compare ours with, and the transfer of our weights into them."""

import importlib
import os
import warnings

import numpy as np
import pytest


def import_keras():
    """Keras on TensorFlow; the test is skipped where TensorFlow has no wheel."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with warnings.catch_warnings():
        # What TensorFlow imports warns of its own future.
        warnings.simplefilter("ignore")
        pytest.importorskip("tensorflow", exc_type=ModuleNotFoundError)
        return importlib.import_module("keras")


def random_variables(shapes, seed):
    """Values for our variables, none of them special: no zero bias, no unit scale or variance.

    Args:
      shapes: our `params` and `running_statistics`, as shapes.
      seed: of the values.
    """
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(leaf.dtype)
        if kind in ("scale", "variance"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

    import jax

    return jax.tree_util.tree_map_with_path(value, shapes)


def copy_into(layer, name, params, running_statistics):
    """Sets the weights of one Keras layer to those of ours with the given name."""
    own = params[name]
    if name in running_statistics:
        statistics = running_statistics[name]
        values = [own["scale"]] if "scale" in own else []
        values += [own["bias"], statistics["mean"], statistics["variance"]]
    else:
        values = [own["kernel"]] + ([own["bias"]] if "bias" in own else [])
    layer.set_weights(values)


def copy_by_name(model, params, running_statistics):
    """Sets the weights of a Keras model whose layers are named as ours; all of them."""
    layers = [layer for layer in model.layers if layer.weights]
    assert {layer.name for layer in layers} == set(params)
    for layer in layers:
        copy_into(layer, layer.name, params, running_statistics)


def wide_resnet(keras, depth, width, image_shape, num_classes):
    """Zagoruyko and Komodakis 2016: table 1, pre-activation blocks as in figure 1 (b)."""
    layers = keras.layers

    def conv(x, channels, size, stride, name):
        x = layers.ZeroPadding2D(size // 2)(x)
        return layers.Conv2D(channels, size, strides=stride, use_bias=False, name=name)(x)

    def activated(x, name):
        return layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name=name)(x))

    image = x = keras.Input(image_shape, dtype=keras.config.dtype_policy().compute_dtype)
    x = conv(x, 16, 3, 1, "stem")
    for group in range(3):
        channels = 16 * 2**group * width
        for block in range((depth - 4) // 6):
            prefix = f"group{group}_block{block}"
            stride = 2 if (group > 0 and block == 0) else 1
            pre = activated(x, f"{prefix}_norm1")
            if block == 0:
                x = conv(pre, channels, 1, stride, f"{prefix}_shortcut")
            y = conv(pre, channels, 3, stride, f"{prefix}_conv1")
            y = conv(activated(y, f"{prefix}_norm2"), channels, 3, 1, f"{prefix}_conv2")
            x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(activated(x, "norm"))
    return keras.Model(image, layers.Dense(num_classes, name="logits")(x))


def resnet_50(keras, image_shape, num_classes):
    """He et al. 2016, table 1, with the stride in the 3x3 convolution (v1.5)."""
    layers = keras.layers

    def conv_norm(x, channels, size, stride, conv_name, norm_name):
        x = layers.ZeroPadding2D((size - 1) // 2)(x)
        x = layers.Conv2D(
            channels, size, strides=stride, padding="valid", use_bias=False, name=conv_name
        )(x)
        return layers.BatchNormalization(epsilon=1e-5, name=norm_name)(x)

    image = keras.Input(image_shape)
    x = layers.ReLU()(conv_norm(image, 64, 7, 2, "stem", "stem_norm"))
    # Activations are not negative, so that padding with zeros is padding with nothing.
    x = layers.MaxPooling2D(3, strides=2)(layers.ZeroPadding2D(1)(x))
    for group, (channels, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            prefix = f"group{group}_block{block}"
            stride = 2 if (group > 0 and block == 0) else 1
            y = x
            for i, (width, size, s) in enumerate(
                [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)], start=1
            ):
                y = conv_norm(y, width, size, s, f"{prefix}_conv{i}", f"{prefix}_norm{i}")
                y = layers.ReLU()(y) if i < 3 else y
            if block == 0:
                name = f"{prefix}_shortcut"
                x = conv_norm(x, 4 * channels, 1, stride, name, f"{name}_norm")
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(num_classes, name="logits")(x))


def copy_into_inception_resnet_v2(model, conv_names, params, running_statistics):
    """Sets the weights of `keras.applications`' Inception-ResNet-V2; all of them.

    Args:
      model: the Keras model.
      conv_names: our convolutions in the order in which they are called.
      params: ours.
      running_statistics: ours.
    """
    pairs = {"predictions": "logits", "conv_7b": "conv_7b", "conv_7b_bn": "conv_7b_norm"}
    for kind, blocks in (("block35", 10), ("block17", 20), ("block8", 10)):
        pairs |= {f"{kind}_{i + 1}_conv": f"{kind}_{i}_up" for i in range(blocks)}
    # The others carry numbers in the order of their making.
    ours = [name for name in conv_names if name not in pairs.values()]
    for stem, suffix in (("conv2d", ""), ("batch_normalization", "_norm")):
        theirs = [
            layer.name
            for layer in model.layers
            if layer.name == stem or layer.name.removeprefix(f"{stem}_").isdigit()
        ]
        theirs.sort(key=lambda name: int(name.removeprefix(stem).lstrip("_") or 0))
        pairs |= dict(zip(theirs, (name + suffix for name in ours), strict=True))
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    assert layers.keys() == pairs.keys()
    assert sorted(pairs.values()) == sorted(params)
    for name, layer in layers.items():
        copy_into(layer, pairs[name], params, running_statistics)
