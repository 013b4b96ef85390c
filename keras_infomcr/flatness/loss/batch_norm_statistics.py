"""The statistics that batch normalisation would have at other weights than the model's own."""

import contextlib
import itertools
from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import ops

from keras_infomcr.flatness.loss.batch_loss import BatchLoss
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.loss.replaced import replaced
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.keras_internals import all_layers


def reestimated_state(loss: LossFunction, data: Iterable, weights: np.ndarray, state: list) -> list:
    """Return the state with the statistics that weights give batch normalisation.

    They are the moments over all batches together. Random layers do not act.

    Args:
        loss: The `LossFunction` of the model.
        data: Iterable of batches `(x, y)` of NumPy arrays, read once.
        weights: Array `[W]`.
        state: List of arrays, the model's other variables.
    """
    batch, model = loss.batch, loss.model
    statistics = compiled_for(model, "batch_norm_statistics", lambda: _Statistics(batch))
    if not statistics.moving:
        return state
    found = loss.mean(statistics.of_batch, data, (loss.arrays(weights), state))
    means, variances, squares = found[::3], found[1::3], found[2::3]
    # The variance of all examples is the mean variance within the batches, and the variance of
    # the batches' means: the mean of their squares without the square of their mean. Rounding
    # makes this negative where there is next to none.
    between = [np.maximum(s - m**2, 0) for m, s in zip(means, squares)]
    variances = [v + b for v, b in zip(variances, between)]
    state = list(state)
    pairs = [statistic for pair in zip(means, variances) for statistic in pair]
    for (k, variable), statistic in zip(statistics.moving, pairs):
        state[k] = ops.convert_to_tensor(statistic, dtype=variable.dtype)
    return state


class _Statistics:
    """The statistics of a batch for the batch normalisation of a model.

    Args:
        batch: The `BatchLoss` of the model.

    Attributes:
        moving: List of pairs: the position in the model's state, and the variable, of the moving
            mean and the moving variance of each layer.
        of_batch: Function `(weights, state, x, y)` of a batch that returns the mean, the variance
            and the square of the mean for each layer. It is compiled.
    """

    def __init__(self, batch: BatchLoss):
        model = batch.model
        layers = [x for x in all_layers(model) if hasattr(x, "moving_variance")]
        self._layers = [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]
        moving = [v for x in self._layers for v in (x.moving_mean, x.moving_variance)]
        ids = [id(v) for v in model.non_trainable_variables]
        self.moving = [(ids.index(id(v)), v) for v in moving]
        self._batch = batch
        statistics = batch.compiled(self._of_inputs)
        # The labels have no part: without them there is no other graph for each kind of them.
        self.of_batch = lambda weights, state, x, y: statistics(weights, state, x)

    def _of_inputs(self, weights, state, x):
        with (
            self._batch.lock,
            self._batch.objective.at(weights, state, False) as (predict, scope),
            contextlib.ExitStack() as stack,
        ):
            for layer in self._layers:
                stack.enter_context(replaced(layer, "momentum", layer.momentum))
                stack.enter_context(replaced(layer, "call", _in_training(layer)))
            predict(x)
            values = [scope.get_current_value(v) for _, v in self.moving]
        pairs = zip(values[::2], values[1::2])
        return [array for mean, variance in pairs for array in (mean, variance, mean**2)]


def _in_training(layer: keras.layers.BatchNormalization) -> Callable:
    """Return a `call` that makes the moving statistics the means over the layer's calls."""
    call, counter = layer.call, itertools.count()

    def call_in_training(inputs, training=None, mask=None):
        # A momentum of n / (n + 1) after n calls makes a moving average the mean of all.
        before = next(counter)
        layer.momentum = before / (before + 1)
        return call(inputs, training=True, mask=mask)

    return call_in_training
