"""The log-odds of the examples of a trial and the Gram matrices of their gradients."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_infomcr import backend
from keras_infomcr.flatness.layers_of_weights import LayersOfWeights, layer_of
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.per_example.shared_outputs import with_shared_outputs
from keras_infomcr.flatness.per_example.taps import CallsChangedError, Taps
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.objective import Objective

# Weights without a tap are taken in groups, so that the rows of all examples take at most so many
# bytes; a weight whose rows take more is a group of its own.
_ROW_BYTES = 2**28


class TrialGrams:
    """Computes per-example values and, for each layer, the Gram matrix of their gradients.

    Tapped layers need one backward pass together; the rows of all other weights are formed.

    It holds nothing of the data, so that it serves all data of one form.

    Args:
        model: A `keras.Model`.
        values: An object of `flatness.loss.example_values`.
        outputs: What the model returns for one example.
        taps: `Taps` of the model, which say what layers are tapped.
        settings: `TrialSettings`.

    Attributes:
        values: The argument.
        outputs: The argument. Its shapes and masks say which labels fit.
        layers: Tuple of the paths of the layers that have trainable weights.
        num_weights: Tuple of the numbers of their trainable weights.
        epsilon: Float, the rounding unit of the gradients.
    """

    def __init__(
        self, model: keras.Model, values: Any, outputs: Any, taps: Taps, settings: TrialSettings
    ):
        self.values = values
        self.outputs = outputs
        self._model = model
        self._training = settings.training
        self._chunk_size = settings.examples_together
        self._objective = Objective(model)
        self._weights = model.trainable_variables
        self._owners = [layer_of(v) for v in self._weights]
        owners = LayersOfWeights(self._weights)
        self.layers, self.num_weights = owners.layers, owners.num_weights
        # Replicas trace in threads, and while one does a layer's `call` is not the layer's own.
        self._lock = threading.RLock()
        raw = self._values_as_they_are
        self._raw_values = raw if model.run_eagerly else backend.compiled(raw)
        self._num_examples = settings.num_examples
        self.epsilon = 0.0
        self._ways = self._ways_with(taps)

    def _ways_with(self, taps: Taps) -> "_Ways":
        """Return the ways to the Gram matrices by the weights with taps, and by the others."""
        tapped = [v for layer in taps.layers for v in taps.weights(layer)]
        self.epsilon = max((self.epsilon, *(float(np.finfo(v.dtype).eps) for v in tapped)))
        known = {id(v) for v in tapped}
        rest = [k for k, v in enumerate(self._weights) if id(v) not in known]
        sizes = [math.prod(self._weights[k].shape) for k in rest]
        groups = _grouped(sizes, _ROW_BYTES // (4 * self._num_examples))
        groups = [[rest[i] for i in group] for group in groups]
        return _Ways(
            taps,
            [layer_of(taps.weights(layer)[0]) for layer in taps.layers],
            backend.compiled(functools.partial(self._tapped_pass, taps)),
            [(group, self._jacobian(group)) for group in groups],
        )

    def __call__(
        self, context: tuple[list, list], data: tuple[Any, Any], device: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the values and the Gram matrices.

        Args:
            context: Tuple of the weights and the state, lists of arrays.
            data: Tuple of structures of NumPy arrays `[N, ...]`.
            device: One of `backend.devices`.

        Returns:
            Tuple of float64 arrays `[N]` and `[L, N, N]`, L the number of layers.
        """
        size = len(keras.tree.flatten(data)[0])
        grams = np.zeros((len(self.layers), size, size))
        ways = self._completed_ways(context, data)
        try:
            values = self._add_tapped(ways, grams, context, data, device)
        except CallsChangedError as changed:
            self._ways = self._ways_with(ways.taps.without(changed.layers))
            return self(context, data, device)
        if ways.jacobians:
            values = self._add_rest(ways, grams, context, data, device)
        return keras.ops.convert_to_numpy(values).astype("float64"), grams

    def _completed_ways(self, context: tuple, data: tuple) -> "_Ways":
        """Return the ways, with all taps that there can be: the first data show it."""
        with self._lock:
            if self._ways.taps.shared and len(keras.tree.flatten(data)[0]) > 1:
                x, y = keras.tree.map_structure(lambda a: keras.ops.convert_to_tensor(a[:2]), data)
                evaluation = functools.partial(self._evaluation, context, x, y)
                self._ways = self._ways_with(with_shared_outputs(self._ways.taps, evaluation))
            return self._ways

    @contextlib.contextmanager
    def _evaluation(self, context: tuple, x: Any, y: Any) -> Iterator[tuple]:
        """Yield the scope of an evaluation, and a function of no arguments that gives values."""
        with self._lock, self._objective.at(*context, False) as (predict, scope):
            yield scope, lambda: self.values(x, y, *predict_with_logits(self._model, predict, x))

    def _add_tapped(
        self, ways: "_Ways", grams: np.ndarray, context: tuple, data: tuple, device: Any
    ) -> Any:
        """Add the Gram matrices of the weights with taps, and return the values if there are."""
        if not ways.owners:
            return None
        values, tapped = backend.on_device(device, ways.tapped, *context, *data)
        for owner, gram in zip(ways.owners, tapped):
            if gram is not None:
                grams[self.layers.index(owner)] += keras.ops.convert_to_numpy(gram)
        return values

    def values_without_normalization(
        self, context: tuple[list, list], data: tuple[Any, Any], device: Any
    ) -> np.ndarray:
        """Return the values by the logits as they are, a float64 array `[N]`.

        Args:
            context: As for a call.
            data: As for a call.
            device: As for a call.
        """
        values = backend.on_device(device, self._raw_values, *context, *data)
        return keras.ops.convert_to_numpy(values).astype("float64")

    def _values_as_they_are(self, weights: list, state: list, x: Any, y: Any) -> Any:
        return self._values_at((weights, state), False, x, y, self.values.without_normalization())

    def _values_at(
        self, context: tuple[list, list], training: bool, x: Any, y: Any, values: Callable
    ) -> Any:
        with self._lock, self._objective.at(*context, training) as (predict, _):
            return values(x, y, *predict_with_logits(self._model, predict, x))

    def _tapped_pass(
        self, taps: Taps, weights: list, state: list, x: Any, y: Any
    ) -> tuple[Any, list]:
        size = keras.tree.flatten(x)[0].shape[0]

        def total(probes):
            with self._lock, self._objective.at(weights, state, False) as (predict, _):
                with taps.open(probes):
                    values = self.values(x, y, *predict_with_logits(self._model, predict, x))
            return keras.ops.sum(values), values

        (_, values), found = backend.value_and_grad(total)(taps.probes(size))
        with self._lock, self._objective.at(weights, state, False):
            return values, taps.grams(found)

    def _add_rest(
        self, ways: "_Ways", grams: np.ndarray, context: tuple, data: tuple, device: Any
    ) -> np.ndarray:
        """Add the Gram matrices of the weights without a tap, and return the values."""
        chunks = [
            keras.tree.map_structure(lambda a, i=i: a[i : i + self._chunk_size], data)
            for i in range(0, grams.shape[-1], self._chunk_size)
        ]
        for group, jacobian in ways.jacobians:
            part = [context[0][k] for k in group]
            results = [backend.on_device(device, jacobian, part, context, *c) for c in chunks]
            values, rows = zip(*results)
            for k, parts in zip(group, zip(*rows)):
                parts = [keras.ops.convert_to_numpy(p).reshape(len(p), -1) for p in parts]
                matrix = np.concatenate(parts) if len(parts) > 1 else parts[0]
                grams[self.layers.index(self._owners[k])] += _gram(matrix)
                self.epsilon = max(self.epsilon, float(np.spacing(matrix.dtype.type(1))))
        return np.concatenate([keras.ops.convert_to_numpy(v) for v in values])

    def _jacobian(self, group: list[int]) -> Callable:
        """Return what gives the values and their rows by the weights of some numbers."""

        def values(part, context, x, y):
            weights, state = list(context[0]), context[1]
            for k, weight in zip(group, part):
                weights[k] = weight
            return self._values_at((weights, state), self._training, x, y, self.values)

        rows_of = backend.jacobian if self._training else backend.gradients_by_example
        return rows_of(values, compiled=not self._model.run_eagerly)


class _Ways(NamedTuple):
    """How the Gram matrices are computed.

    Attributes:
        taps: `Taps`.
        owners: List of the paths of the layers with taps.
        tapped: Function that gives the values, and the Gram matrix of each layer with a tap.
        jacobians: List of tuples: numbers of weights, and the function that gives their rows.
    """

    taps: Taps
    owners: list[str]
    tapped: Callable
    jacobians: list


def _grouped(sizes: list[int], limit: int) -> list[range]:
    """Cut a list of sizes into ranges of at most `limit` together, at least one size each."""
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            groups.append(range(start, i))
            start, total = i, 0
        total += size
    return [*groups, range(start, len(sizes))] if sizes else []


def _gram(matrix: np.ndarray, width: int = 2**16) -> np.ndarray:
    """Return matrix @ matrix.T in float64, a few columns at a time."""
    gram = np.zeros((len(matrix), len(matrix)))
    for start in range(0, matrix.shape[1], width):
        columns = matrix[:, start : start + width].astype("float64")
        with np.errstate(invalid="ignore"):  # NaN is reported with its cause by `gamma_hat`
            gram += columns @ columns.T
    return gram
