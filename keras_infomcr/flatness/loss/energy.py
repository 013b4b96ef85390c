"""The loss and the 0-1 error of a model at other weights than its own.

Private names of Keras used here, unchanged from 3.10 to 3.15: the functions for masks, which its
losses and metrics use too.
"""

import contextlib
import itertools

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.masking import get_keras_mask

from keras_infomcr.flatness.loss.example_values import kind_of_loss
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.loss.replaced import replaced


class Energy(LossFunction):
    """The loss and the 0-1 error over data, batch normalisation in inference mode.

    Args:
        model: A compiled and built `keras.Model`.
    """

    def __init__(self, model):
        super().__init__(model)
        self._energies = self.compiled(self._of_batch)
        self._statistics = self.compiled(self._statistics_of_batch)
        layers = [x for x in model._flatten_layers() if hasattr(x, "moving_variance")]
        self._layers = [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]
        moving = [v for x in self._layers for v in (x.moving_mean, x.moving_variance)]
        ids = [id(v) for v in model.non_trainable_variables]
        self._moving = [(ids.index(id(v)), v) for v in moving]

    def energies(self, data, weights, state):
        """Return the loss and the 0-1 error, floats; the error is NaN if there are no classes."""
        means = self.mean(self._energies, data, (self.arrays(weights), state))
        loss, error = (np.nan if mean is None else float(mean) for mean in means)
        return loss, error

    def reestimated(self, data, weights, state):
        """Return the state with the statistics that the weights give batch normalisation.

        They are those of the data, of all batches together. Random layers do not act.
        """
        if not self._moving:
            return state
        args = self.arrays(weights), state
        found = self.mean(lambda *a: self._statistics(*a[:-1]), data, args)
        means, variances, squares = found[::3], found[1::3], found[2::3]
        # That of all is the mean within the batches and that of their means.
        # The latter is rounded to that of the squares, below zero too where there is next to none.
        between = [np.maximum(s - m**2, 0) for m, s in zip(means, squares)]
        variances = [v + b for v, b in zip(variances, between)]
        state = list(state)
        pairs = [statistic for pair in zip(means, variances) for statistic in pair]
        for (k, variable), statistic in zip(self._moving, pairs):
            state[k] = ops.convert_to_tensor(statistic, dtype=variable.dtype)
        return state

    def _of_batch(self, weights, state, x, y):
        loss, outputs = self.evaluate(weights, state, x, y)
        return loss, self._error(y, outputs)

    def _error(self, y, outputs):
        loss, kind = kind_of_loss(self.model, outputs)
        if kind is None:
            return None
        y, outputs = (keras.tree.flatten(a)[0] for a in (y, outputs))
        mask = get_keras_mask(outputs)
        if kind == "binary":
            threshold = 0.0 if getattr(loss, "from_logits", False) else 0.5
            y = ops.cast(ops.reshape(y, ops.shape(outputs)), outputs.dtype)
            right = ops.equal(y >= 0.5, outputs > threshold)[..., 0]
        elif "sparse" in getattr(loss, "__name__", type(loss).__name__).lower():
            right = keras.metrics.sparse_categorical_accuracy(y, outputs)
        else:
            right = keras.metrics.categorical_accuracy(y, outputs)
        wrong = 1 - ops.cast(right, "float32")
        if mask is None:
            return ops.mean(wrong)
        mask = ops.cast(mask, "float32")
        return ops.sum(mask * wrong) / ops.maximum(ops.sum(mask), 1)

    def _statistics_of_batch(self, weights, state, x):
        with (
            self._lock,
            self._objective.at(weights, state, False) as (predict, scope),
            contextlib.ExitStack() as stack,
        ):
            for layer in self._layers:
                stack.enter_context(replaced(layer, "momentum", layer.momentum))
                stack.enter_context(replaced(layer, "call", _in_training(layer)))
            predict(x)
            values = [scope.get_current_value(v) for _, v in self._moving]
        pairs = zip(values[::2], values[1::2])
        return [array for mean, variance in pairs for array in (mean, variance, mean**2)]


def _in_training(layer):
    """Return a `call` that makes the moving statistics the means over the layer's calls."""
    call, counter = layer.call, itertools.count()

    def call_in_training(inputs, training=None, mask=None):
        before = next(counter)
        layer.momentum = before / (before + 1)
        return call(inputs, training=True, mask=mask)

    return call_in_training
