"""Small nets and their data, and how the tests of `fit` compile and train them.

There are six examples. In batches of five, the first batch has sub-batches of two and three
examples, and the last batch is a single example.
"""

import keras
import numpy as np
import pytest
from frameworks import BACKEND

SIZE = 6
draw = np.random.default_rng(0)
X = draw.normal(size=(SIZE, 4))
Y = draw.normal(size=(SIZE, 2))
LABELS = draw.integers(3, size=SIZE)
WEIGHTS = draw.uniform(0.2, 3, size=SIZE)
# How the step runs. Tracing and compiling take most of the time of these small tests, so that a
# test runs eagerly where a graph would show nothing more.
EAGER, XLA = {"run_eagerly": True}, {"jit_compile": True}
# The same for tests of single steps. Without a compiler JAX dispatches one operation after the
# other, which takes longer than compiling them together.
QUICKEST = {} if BACKEND == "jax" else EAGER
with_main_gradient = pytest.mark.parametrize(
    ("main", "mode"), [("full_batch", EAGER), ("auto", {})], ids=["full_batch", "auto"]
)


def fitting(x=X, y=Y, **kwargs):
    """Return a function that fits a model and returns its logs."""
    kwargs = {"batch_size": 5, "shuffle": False, "verbose": 0, **kwargs}
    return lambda model: dict(model.fit(x, y, **kwargs).history)


def compiling(optimizer=lambda: sgd(), **kwargs):
    """Return a function that makes the arguments of `compile`, with a new optimizer each time."""
    return lambda: {"optimizer": optimizer(), "loss": "mse", **kwargs}


def sgd(**kwargs):
    # Keras rounds the rate to float32, which is exact for a power of two.
    return keras.optimizers.SGD(1 / 8, **kwargs)


def two_layers(base, **kwargs):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh", **kwargs)(inputs)
    return base(inputs, keras.layers.Dense(2, **kwargs)(hidden))


def classifier(base):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh")(inputs)
    return base(inputs, keras.layers.Dense(3, "softmax")(hidden))


def two_heads(base):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh")(inputs)
    a = keras.layers.Dense(3, "softmax", name="a")(hidden)
    return base(inputs, {"a": a, "b": keras.layers.Dense(2, name="b")(hidden)})


def normalized(base):
    """Return a model with all that has a state: batch norm, dropout, noise, a layer's metric."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.75)(x)
    x = keras.layers.Activation("gelu")(x)
    if BACKEND != "jax":  # where Keras cannot update metrics in a layer
        x = Measured()(x)
    x = keras.layers.GaussianNoise(0.1)(keras.layers.Dropout(0.25)(x))
    return base(inputs, keras.layers.Dense(2)(x))


class Measured(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean(name="size")

    def call(self, x):
        self.mean.update_state(keras.ops.abs(x))
        return x


class ActivityLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**4))
        return x


HEADS = {
    "loss": {"a": "sparse_categorical_crossentropy", "b": "mse"},
    "metrics": {"a": ["accuracy"], "b": ["mae"]},
}
