"""Small networks whose Hessian NumPy forms in float64."""

import functools

import keras
import numpy as np
import numpy_layers as oracle
from frameworks import numpy
from keras import layers

NUM_CLASSES = 3


def dense_batch_norm(x, w, training):
    hidden = x @ w[0] + w[1]
    moments = (hidden.mean(0), variance(hidden, 0)) if training else w[6:]
    return np.tanh(oracle.normalize(hidden, *moments, *w[2:4])) @ w[4] + w[5]


def conv_batch_norm(x, w, training):
    hidden = oracle.conv_2d(x, w[0], w[1])
    moments = (hidden.mean((0, 1, 2)), variance(hidden, (0, 1, 2))) if training else w[6:]
    hidden = np.tanh(oracle.normalize(hidden, *moments, *w[2:4]))
    return hidden.mean((1, 2)) @ w[4] + w[5]


def layer_norm(x, w, training):
    hidden = x @ w[0] + w[1]
    return np.tanh(oracle.normalize_by_own_moments(hidden, -1, *w[2:4])) @ w[4] + w[5]


def group_norm(x, w, training):
    hidden = np.tanh(oracle.group_norm(oracle.conv_2d(x, w[0], w[1]), 2, *w[2:4]))
    return hidden.mean((1, 2)) @ w[4] + w[5]


def resized(x, w, training):
    hidden = oracle.conv_2d(x, w[0], w[1])
    rows = np.clip((np.arange(6) + 0.5) / 2 - 0.5, 0, 2)  # of the 3 there are
    weights = np.maximum(1 - np.abs(rows[:, None] - np.arange(3)), 0)
    hidden = np.tanh(np.einsum("bijc,Ii,Jj->bIJc", hidden, weights, weights))
    return hidden.mean((1, 2)) @ w[2] + w[3]


def variance(a, axes):
    """Return the variance, analytic in complex numbers too."""
    return ((a - a.mean(axes, keepdims=True)) ** 2).mean(axes)


FLAT, IMAGES = (5,), (4, 4, 2)
SETTINGS = {
    layers.GroupNormalization: {"groups": 2, "epsilon": 1e-3},
    layers.UpSampling2D: {"interpolation": "bilinear"},
}
NETS = {
    "dense_batch_norm": (dense_batch_norm, FLAT, layers.Dense, layers.BatchNormalization),
    "conv_batch_norm": (conv_batch_norm, IMAGES, layers.Conv2D, layers.BatchNormalization),
    "layer_norm": (layer_norm, FLAT, layers.Dense, layers.LayerNormalization),
    "group_norm": (group_norm, IMAGES, layers.Conv2D, layers.GroupNormalization),
    "resized": (resized, IMAGES, layers.Conv2D, layers.UpSampling2D),
}


class Net:
    """A network with what NumPy says of it."""

    def __init__(self, name, rng):
        self.forward, shape, first, second = NETS[name]
        pool = [layers.GlobalAveragePooling2D()] if len(shape) == 3 else []
        settings = SETTINGS.get(second, {"epsilon": 1e-3})
        stack = [first(4, *[2] * bool(pool)), second(**settings)]
        self.model = keras.Sequential(
            [keras.Input(shape), *stack, layers.Activation("tanh"), *pool, layers.Dense(3)]
        )
        self.model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
        for variable in self.model.variables:
            positive = "variance" in variable.path
            variable.assign(rng.uniform(0.5 if positive else -1, 1.5, variable.shape))
        self.x = rng.normal(size=(24, *shape)).astype("float32")
        self.y = np.eye(NUM_CLASSES)[rng.integers(0, NUM_CLASSES, 24)].astype("float32")
        self.weights = [numpy(v).astype("float64") for v in self.model.trainable_variables]
        self.moments = [numpy(v).astype("float64") for v in self.model.non_trainable_variables]
        self.moments = self.moments[:2] if "batch" in name else []
        self.sizes = [w.size for w in self.weights]

    def loss(self, weights, training=False):
        predictions = self.forward(self.x.astype("float64"), [*weights, *self.moments], training)
        return oracle.cross_entropies(self.y, predictions).mean()

    def product(self, vector, training=False):
        """Return H v."""
        parts = self.parts(vector)
        loss = lambda w: self.loss(w, training)  # noqa: E731
        return flat(oracle.hessian_vector_product(loss, self.weights, parts))

    @functools.cached_property
    def hessian(self):
        """Return H, by central differences: the errors are of the order 1e-10."""
        columns = []
        for unit in np.eye(sum(self.sizes)):
            ends = [
                flat(oracle.derivative(self.loss, [w + s * u for w, u in zip(self.weights, parts)]))
                for s, parts in ((1e-5, self.parts(unit)), (-1e-5, self.parts(unit)))
            ]
            columns.append((ends[0] - ends[1]) / 2e-5)
        return (np.array(columns) + np.array(columns).T) / 2

    def parts(self, vector):
        parts = np.split(np.asarray(vector, "float64"), np.cumsum(self.sizes)[:-1])
        return [p.reshape(w.shape) for p, w in zip(parts, self.weights)]

    def measured(self, measure, **settings):
        return measure(self.model, self.x, self.y, seed=0, **settings)


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])
