"""Algorithm 1 of the paper in NumPy, with the gradients of two small nets written out by hand."""

import keras
import numpy as np
from frameworks import slices

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

ALPHA, BETA = 0.01, 10.1
RATE, MOMENTUM, PENALTY = 1 / 8, 7 / 8, 1 / 64  # Keras rounds them to float32: exact


class SoftmaxRegression:
    """Cross-entropy of softmax(x W + b); parameters [W, b]."""

    shapes = ((5, 3), (3,))

    @staticmethod
    def layers(penalty):
        return [keras.layers.Dense(3, kernel_regularizer=penalty)]

    @staticmethod
    def loss_and_gradients(parameters, x, y, sample_weight):
        w, b = parameters
        loss, d_logits = cross_entropy(x @ w + b, y, sample_weight)
        return loss, [x.T @ d_logits, d_logits.sum(0)]


class TwoLayers:
    """Cross-entropy of softmax(tanh(x W + b) V + c); parameters [W, b, V, c]."""

    shapes = ((5, 4), (4,), (4, 3), (3,))

    @staticmethod
    def layers(penalty):
        return [
            keras.layers.Dense(4, "tanh", kernel_regularizer=penalty),
            keras.layers.Dense(3, kernel_regularizer=penalty),
        ]

    @staticmethod
    def loss_and_gradients(parameters, x, y, sample_weight):
        w, b, v, c = parameters
        hidden = np.tanh(x @ w + b)
        loss, d_logits = cross_entropy(hidden @ v + c, y, sample_weight)
        d_hidden = (d_logits @ v.T) * (1 - hidden**2)
        return loss, [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits, d_logits.sum(0)]


def cross_entropy(logits, y, sample_weight):
    """Return the sum of weighted losses over their number, Keras's mean, with its gradient."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(y))
    loss = -(sample_weight * np.log(p[rows, y])).mean()
    p[rows, y] -= 1
    return loss, p * sample_weight[:, None] / len(y)


class Algorithm1:
    """SGD with momentum on L(B, w) + penalties + beta R_alpha(w), a literal reading."""

    def __init__(self, net, parameters, penalty, num_sub_batches):
        self.net = net
        self.parameters = [p.copy() for p in parameters]
        self.velocity = [np.zeros_like(p) for p in parameters]
        self.penalty = penalty
        self.num_sub_batches = num_sub_batches

    def regularizer(self, x, y, sample_weight):
        """Return R_alpha and its gradient."""
        value, gradient = 0.0, [np.zeros_like(p) for p in self.parameters]
        for i in slices(len(x), self.num_sub_batches):
            batch = x[i], y[i], sample_weight[i]
            loss, g = self.net.loss_and_gradients(self.parameters, *batch)
            moved = [p - ALPHA * d for p, d in zip(self.parameters, g)]
            loss_moved, h = self.net.loss_and_gradients(moved, *batch)
            value += len(i) / len(x) * (loss - loss_moved)
            for total, a, b in zip(gradient, g, h):
                total += len(i) / len(x) * (a - b)
        return value, gradient

    def step(self, x, y, sample_weight):
        """Take a step; return the training loss and R_alpha before it."""
        loss, g = self.net.loss_and_gradients(self.parameters, x, y, sample_weight)
        value, r = self.regularizer(x, y, sample_weight)
        for i, p in enumerate(self.parameters):
            if p.ndim == 2:
                loss += self.penalty * (p**2).sum()
                g[i] = g[i] + 2 * self.penalty * p
        for i in range(len(g)):
            self.velocity[i] = MOMENTUM * self.velocity[i] - RATE * (g[i] + BETA * r[i])
            self.parameters[i] = self.parameters[i] + self.velocity[i]
        return loss, value


def make(net, penalty=0.0, **kwargs):
    """Return a compiled model that computes what `net` does; `kwargs` are the rule's."""
    kwargs = {"alpha": ALPHA, "beta": BETA, **kwargs}
    x = inputs = keras.Input((5,))
    for layer in net.layers(keras.regularizers.L2(penalty) if penalty else None):
        x = layer(x)
    model = RegularizedModel(inputs, x)
    model.set_weights([np.random.default_rng(1).normal(size=s) for s in net.shapes])
    model.compile(
        keras.optimizers.SGD(RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=SubBatchPerturbation(**kwargs),
    )
    model.optimizer.build(model.trainable_variables)  # else Keras traces the step twice
    return model


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def assert_same_direction(got, expected, tolerance=1e-10):
    """Compare lists of arrays, with a tolerance relative to the norm of all."""
    got, expected = flat(got), flat(expected)
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
