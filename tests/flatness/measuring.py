"""What is asked of every measure: to leave all as it was, and to take data of any kind."""

import random

import keras
import numpy as np
import pytest
from frameworks import BACKEND, global_random_number, numpy, only_on, tensorflow
from keras import layers
from nets import from_logits

from keras_infomcr.flatness import gamma_hat


def measure(model, x, y, **kwargs):
    """Measure one trial of all examples."""
    num_examples = len(keras.tree.flatten(x)[0])
    return gamma_hat(model, x, y, num_examples=num_examples, num_trials=1, **kwargs)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, num_batches):
        super().__init__()
        self.x, self.y, self._num_batches = x, y, num_batches

    @property
    def num_batches(self):
        return self._num_batches

    def __getitem__(self, index):
        part = slice(5 * (index % 3), 5 * (index % 3) + 5)
        return self.x[part], self.y[part]


def dataset(x, y, *weights):
    return tensorflow().data.Dataset.from_tensor_slices((x, y, *weights)).batch(5)


def ragged(size):
    return tensorflow().ragged.constant([[1.0], [1.0, 2.0]] * (size // 2))


def in_batches(x, y):
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]


def loader(x, y):
    import torch

    tensors = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return torch.utils.data.DataLoader(tensors, batch_size=5)


# Of 12 examples in batches of 5, 5 and 2.
kinds_of_data = pytest.mark.parametrize(
    "make",
    [
        dataset,
        lambda x, y: Batches(x, y, 3),
        in_batches,
        pytest.param(loader, marks=only_on("torch", "jax", reason="needs torch")),
    ],
    ids=["dataset", "PyDataset", "list", "DataLoader"],
)


class Unseeded(layers.Layer):
    """Draws from the global generator of `keras.random`."""

    def call(self, inputs, training=False):
        if not training:
            return inputs
        return inputs + 0.1 * keras.random.normal(keras.ops.shape(inputs), dtype=inputs.dtype)


def numbers_drawn():
    return [random.random(), np.random.random(), *numpy(keras.random.uniform((2,))),
            global_random_number()]  # fmt: skip


def assert_untouched(measure):
    """Assert that `measure(model, x, y)` changes no variable, no random state and no data."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, 4, 12)
    stack = [layers.Dense(8, kernel_regularizer="l2"), layers.BatchNormalization()]
    stack += [layers.Dropout(0.3), layers.GaussianNoise(0.1)]
    if BACKEND != "jax":  # which refuses it
        stack.append(Unseeded())
    model = keras.Sequential([keras.Input((6,)), *stack, layers.Dense(4)])
    model.compile("adam", from_logits())
    model.optimizer.build(model.trainable_variables)
    for variable in model.variables + model.optimizer.variables:
        if "float" in variable.dtype:
            variable.assign(rng.uniform(0.1, 1, variable.shape))

    def state():
        variables = model.variables + model.optimizer.variables
        modes = [getattr(layer, "training", None) for layer in model.layers]  # torch's modules
        penalties = [getattr(v, "regularizer", None) for v in model.trainable_variables]
        return [numpy(v).copy() for v in variables], modes, penalties

    before, arrays = state(), (x.copy(), y.copy())
    keras.utils.set_random_seed(1)
    numbers_drawn()  # makes the global generator, which takes its seed from Python's
    expected = numbers_drawn()
    keras.utils.set_random_seed(1)
    numbers_drawn()
    measure(model, x, y)
    drawn = numbers_drawn()
    np.testing.assert_equal(drawn, expected)
    np.testing.assert_equal(state(), before)
    np.testing.assert_equal((x, y), arrays)


def softmax(logits):
    """Return probabilities in float64, without overflow."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class Quadratic:
    """A linear model with the mean squared error, whose loss is a quadratic of the weights.

        L(w + d) = loss + slope d + d^T hessian d / 2

    Args:
        rng: NumPy generator.
        offset: Float, the mean of the labels.
        fitted: Boolean, whether the labels are `offset` above what the model says.
    """

    def __init__(self, rng, offset=0.0, fitted=False):
        self.model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        self.model.compile("sgd", "mse")
        dtype = keras.config.floatx()
        for variable in self.model.variables:
            variable.assign(rng.uniform(-2, 2, variable.shape))
        kernel, bias = (numpy(v).astype("float64") for v in self.model.variables)
        self.x = rng.normal(size=(12, 3)).astype(dtype)
        self.y = (rng.normal(size=(12, 2)) + offset).astype(dtype)
        with_one = np.concatenate([self.x, np.ones((12, 1))], axis=1).astype("float64")
        self.weights = np.concatenate([kernel, bias[None]]).ravel()
        predictions = with_one @ np.concatenate([kernel, bias[None]])
        self.y = (predictions + offset).astype(dtype) if fitted else self.y
        residuals = predictions - self.y
        self.loss = np.mean(residuals**2)
        self.slope = (2 * with_one.T @ residuals / residuals.size).ravel()
        self.hessian = 2 * np.kron(with_one.T @ with_one, np.eye(2)) / residuals.size

    def rises(self, steps):
        """Return L(w + d) - L(w) of each row d of an array `[n, W]`."""
        return steps @ self.slope + np.sum(steps * (steps @ self.hessian), axis=1) / 2
