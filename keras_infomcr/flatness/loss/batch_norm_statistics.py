"""The statistics that batch normalisation would have at other weights than the model's own."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.loss.means import mean_over_examples
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.flatness.running.only_checking import end_of_checks
from keras_infomcr.keras_internals import all_layers
from keras_infomcr.objective import Objective
from keras_infomcr.objective.replaced import replaced


def reestimated_state(loss: LossFunction, data: Iterable, weights: np.ndarray, state: list) -> list:
    """Return the state with the statistics that weights give batch normalisation.

    They are the moments over all batches together. Random layers do not act.

    Args:
        loss: The `LossFunction` of the model.
        data: Iterable of batches `(x, y)` of NumPy arrays, which can be read again.
        weights: Array `[W]`.
        state: List of arrays, the model's other variables.
    """
    state = list(state)
    model = loss.model
    positions = {id(v): k for k, v in enumerate(model.non_trainable_variables)}
    for variable, value in reestimated_statistics(model, data, loss.arrays(weights), state):
        state[positions[id(variable)]] = ops.convert_to_tensor(value, dtype=variable.dtype)
    return state


def reestimated_statistics(
    model: keras.Model, data: Iterable, weights: list, state: list
) -> list[tuple[keras.Variable, np.ndarray]]:
    """Return the moving statistics of batch normalisation, each with its value at given weights.

    Args:
        model: A built `keras.Model`; it needs no loss.
        data: As for `reestimated_state`.
        weights: List of arrays, the trainable variables.
        state: As for `reestimated_state`.
    """
    statistics = compiled_for(model, "batch_norm_statistics", lambda: _Statistics(model))
    if not statistics.moving:
        return []
    end_of_checks()

    def mean(data, shifts):
        devices, args = backend.devices(model), (weights, state, shifts)
        return mean_over_examples(statistics.of_batch, data, args, devices, _nothing, _nothing)

    # The variance of all examples is the mean variance within the batches, and the variance of
    # the batches' means: the mean of their squares without the square of their mean. This takes
    # away digits unless the means are small: they are measured from the means of one batch.
    zeros = [ops.zeros(v.shape, v.dtype) for _, v in statistics.moving[::2]]
    first = mean(itertools.islice(iter(data), 1), zeros)[::3]
    shifts = [ops.convert_to_tensor(m, dtype=z.dtype) for m, z in zip(first, zeros)]
    found = mean(data, shifts)
    values = []
    for shift, m, variance, square in zip(shifts, found[::3], found[1::3], found[2::3]):
        # Rounding makes the difference negative where there is next to none.
        values += [ops.convert_to_numpy(shift) + m, variance + np.maximum(square - m**2, 0)]
    return [(v, value) for (_, v), value in zip(statistics.moving, values)]


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the moving mean and the moving variance of each batch normalisation in a model."""
    return [v for x in _batch_normalisations(model) for v in (x.moving_mean, x.moving_variance)]


def _batch_normalisations(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    layers = [x for x in all_layers(model) if hasattr(x, "moving_variance")]
    return [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]


class _Statistics:
    """The statistics of a batch for the batch normalisation of a model.

    Args:
        model: A built `keras.Model`.

    Attributes:
        moving: List of pairs: the position in the model's state, and the variable, of the moving
            mean and the moving variance of each layer.
        of_batch: Function `(weights, state, shifts, x, y)` of a batch that returns for each layer
            the mean less the shift, the variance, and the square of the first. It is compiled.
    """

    def __init__(self, model: keras.Model):
        self._layers = _batch_normalisations(model)
        ids = [id(v) for v in model.non_trainable_variables]
        self.moving = [(ids.index(id(v)), v) for v in moving_statistics(model)]
        self._objective = Objective(model)
        # Threads evaluate replicas of one model, whose attributes an evaluation replaces.
        self._lock = threading.Lock()
        statistics = self._of_inputs if model.run_eagerly else backend.compiled(self._of_inputs)
        # The labels have no part: without them there is no other graph for each kind of them.
        self.of_batch = lambda weights, state, shifts, x, y: statistics(weights, state, shifts, x)

    def _of_inputs(self, weights, state, shifts, x):
        with (
            self._lock,
            self._objective.at(weights, state, False) as (predict, scope),
            contextlib.ExitStack() as stack,
        ):
            for layer in self._layers:
                stack.enter_context(replaced(layer, "momentum", layer.momentum))
                stack.enter_context(replaced(layer, "call", _in_training(layer)))
            predict(x)
            values = [scope.get_current_value(v) for _, v in self.moving]
        means = [mean - shift for mean, shift in zip(values[::2], shifts)]
        pairs = zip(means, values[1::2])
        return [array for mean, variance in pairs for array in (mean, variance, mean**2)]


def _nothing(batch, args):
    """Check nothing of a batch."""


def _in_training(layer: keras.layers.BatchNormalization) -> Callable:
    """Return a `call` that makes the moving statistics the means over the layer's calls."""
    call, counter = layer.call, itertools.count()

    def call_in_training(inputs, training=None, mask=None):
        # A momentum of n / (n + 1) after n calls makes a moving average the mean of all.
        before = next(counter)
        layer.momentum = before / (before + 1)
        return call(inputs, training=True, mask=mask)

    return call_in_training
