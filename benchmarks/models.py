"""What the benchmarks measure: the networks of examples/ and a perceptron, on random data."""

import pathlib
import sys

import keras
import numpy as np

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from images import digits  # noqa: E402
from networks import NETWORKS as IMAGE_NETWORKS  # noqa: E402

__all__ = ["EXAMPLES", "NETWORKS", "batch_norms", "digits", "make", "mlp", "random_data"]


def mlp(num_classes=10):
    """Return `(inputs, logits)` of a perceptron of two hidden layers for 28 x 28 images."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Flatten()(inputs)
    for _ in range(2):
        x = keras.layers.Dense(512, "relu")(x)
    return inputs, keras.layers.Dense(num_classes)(x)


NETWORKS = {"mlp": mlp, **IMAGE_NETWORKS}


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
    """Return random inputs of the shape that a model takes, float32, and labels in 10 classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(number, *model.input_shape[1:])).astype("float32")
    return x, rng.integers(10, size=number).astype("int32")


def batch_norms(model):
    """Return the layers of batch normalisation."""
    return [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
