"""What the benchmarks measure: the networks of examples/ and smaller ones, on random data."""

import pathlib
import sys

import keras
import numpy as np

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from images import digits  # noqa: E402
from networks import NETWORKS as IMAGE_NETWORKS  # noqa: E402

__all__ = ["EXAMPLES", "NETWORKS", "batch_norms", "digits", "make", "mlp", "random_data"]

VOCABULARY = 5000


def mlp(num_classes=10):
    """Return `(inputs, logits)` of a perceptron of two hidden layers for 28 x 28 images."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Flatten()(inputs)
    for _ in range(2):
        x = keras.layers.Dense(512, "relu")(x)
    return inputs, keras.layers.Dense(num_classes)(x)


def mobilenet(num_classes=10):
    """Return `(inputs, logits)` of depthwise separable convolutions for 32 x 32 images."""
    inputs = keras.Input((32, 32, 3))
    x = _normalized(keras.layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs))
    for filters, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1)]:
        convolution = keras.layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False)
        x = _normalized(convolution(x))
        x = _normalized(keras.layers.Conv2D(filters, 1, use_bias=False)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return inputs, keras.layers.Dense(num_classes)(x)


def _normalized(x):
    return keras.layers.ReLU()(keras.layers.BatchNormalization()(x))


def transformer(num_classes=10, num_blocks=2):
    """Return `(inputs, logits)` of a text transformer for sequences of 64 tokens."""
    inputs = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 64)(inputs)
    return inputs, _head(_encoded(x, inputs.shape[1], num_blocks, "relu"), num_classes)


def vit(num_classes=10, num_blocks=4):
    """Return `(inputs, logits)` of a vision transformer for 32 x 32 images."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(64, 4, 4)(inputs)
    x = keras.layers.Reshape((-1, 64))(x)
    return inputs, _head(_encoded(x, x.shape[1], num_blocks, "gelu"), num_classes)


def _encoded(x, length, num_blocks, activation):
    """Return the outputs of pre-norm blocks of a vector for each of `length` positions."""
    width = x.shape[-1]
    positions = keras.ops.cumsum(keras.ops.ones_like(x[..., 0]), axis=1) - 1
    x = x + keras.layers.Embedding(length, width)(positions)
    for _ in range(num_blocks):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, width // 4)(y, y)
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(width)(keras.layers.Dense(4 * width, activation)(y))
    return keras.layers.LayerNormalization()(x)


def _head(x, num_classes):
    return keras.layers.Dense(num_classes)(keras.layers.GlobalAveragePooling1D()(x))


NETWORKS = {
    "mlp": mlp,
    "mobilenet": mobilenet,
    "transformer": transformer,
    "vit": vit,
    **IMAGE_NETWORKS,
}


def make(name, base=keras.Model, **compile_options):
    """Return a compiled model, with the same initial weights in each call.

    Args:
        name: String, one of `NETWORKS`.
        base: Class, `keras.Model` or a subclass of it.
        **compile_options: Arguments of `compile`, which has a loss and SGD otherwise.
    """
    keras.utils.set_random_seed(0)
    model = base(*NETWORKS[name]())
    options = {
        "optimizer": keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    model.compile(**options | compile_options)
    return model


def random_data(model, number):
    """Return random inputs of the form that a model takes, and labels in 10 classes."""
    rng = np.random.default_rng(0)
    shape = number, *model.input_shape[1:]
    if model.inputs[0].dtype == "int32":
        x = rng.integers(VOCABULARY, size=shape).astype("int32")
    else:
        x = rng.normal(size=shape).astype("float32")
    return x, rng.integers(10, size=number).astype("int32")


def batch_norms(model):
    """Return the layers of batch normalisation."""
    return [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
