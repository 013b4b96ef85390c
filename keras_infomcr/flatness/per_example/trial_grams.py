"""The log-odds of the examples of a trial and the Gram matrices of their gradients."""

import math
import threading

import keras
import numpy as np

from keras_infomcr import backend
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.objective import Objective

# Weights without a tap are taken in groups whose rows, of all examples, take so many bytes at
# most; or one weight at a time.
_ROW_BYTES = 2**28


class TrialGrams:
    """Computes per-example values and, for each layer, the Gram matrix of their gradients.

    Tapped layers need one backward pass together; the rows of all other weights are formed.

    Args:
        model: A `keras.Model`.
        values: An object of `flatness.example_values`.
        taps: `Taps` of the model.
        num_examples: Integer, at least 1, N.
        training: Boolean, as for the model's `call`.
        chunk_size: Integer, at least 1: examples that go through the model together.

    Attributes:
        layers: Tuple of the paths of the layers that have trainable weights.
        num_weights: Tuple of the numbers of their trainable weights.
        epsilon: Float, the rounding unit of the gradients.
    """

    def __init__(self, model, values, taps, num_examples, training, chunk_size):
        self.model = model
        self.values = values
        self.taps = taps
        self.training = training
        self.chunk_size = chunk_size
        self._objective = Objective(model)
        self._weights = model.trainable_variables
        self._owners = [_owner(v) for v in self._weights]
        self.layers = tuple(dict.fromkeys(self._owners))
        sizes = [math.prod(v.shape) for v in self._weights]
        self.num_weights = tuple(
            sum(size for size, owner in zip(sizes, self._owners) if owner == layer)
            for layer in self.layers
        )
        tapped = [id(v) for layer in taps.layers for v in taps.weights(layer)]
        self._tapped_owners = [_owner(taps.weights(layer)[0]) for layer in taps.layers]
        self.epsilon = max((float(np.finfo(x.variable_dtype).eps) for x in taps.layers), default=0)
        self._lock = threading.Lock()
        self._tapped = backend.compiled(self._tapped_pass)
        rest = [k for k, v in enumerate(self._weights) if id(v) not in tapped]
        groups = _grouped([sizes[k] for k in rest], _ROW_BYTES // (4 * num_examples))
        groups = [[rest[i] for i in group] for group in groups]
        self._jacobians = [(group, self._jacobian(group)) for group in groups]

    def __call__(self, context, data, device):
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
        if self._tapped_owners:
            values, tapped = backend.on_device(device, self._tapped, *context, *data)
            for owner, gram in zip(self._tapped_owners, tapped):
                if gram is not None:
                    grams[self.layers.index(owner)] += keras.ops.convert_to_numpy(gram)
        if self._jacobians:
            values = self._add_rest(grams, context, data, device)
        return keras.ops.convert_to_numpy(values).astype("float64"), grams

    def _tapped_pass(self, weights, state, x, y):
        size = keras.tree.flatten(x)[0].shape[0]

        def total(probes):
            with self._lock, self._objective.at(weights, state, False) as (predict, _):
                with self.taps.open(probes):
                    values = self.values(x, y, *predict_with_logits(self.model, predict, x))
            return keras.ops.sum(values), values

        with backend.float64_allowed():
            probes = [keras.ops.zeros((size, size), "float64") for _ in self.taps.layers]
        (_, values), grams = backend.value_and_grad(total)(probes)
        return values, grams

    def _add_rest(self, grams, context, data, device):
        """Add the Gram matrices of the weights without a tap, and return the values."""
        chunks = [
            keras.tree.map_structure(lambda a, i=i: a[i : i + self.chunk_size], data)
            for i in range(0, grams.shape[-1], self.chunk_size)
        ]
        for group, jacobian in self._jacobians:
            part = [context[0][k] for k in group]
            results = [backend.on_device(device, jacobian, part, context, *c) for c in chunks]
            values, rows = zip(*results)
            for k, parts in zip(group, zip(*rows)):
                parts = [keras.ops.convert_to_numpy(p).reshape(len(p), -1) for p in parts]
                matrix = np.concatenate(parts) if len(parts) > 1 else parts[0]
                grams[self.layers.index(self._owners[k])] += _gram(matrix)
                self.epsilon = max(self.epsilon, float(np.spacing(matrix.dtype.type(1))))
        return np.concatenate([keras.ops.convert_to_numpy(v) for v in values])

    def _jacobian(self, group):
        def values(part, context, x, y):
            weights, state = list(context[0]), context[1]
            for k, weight in zip(group, part):
                weights[k] = weight
            with self._lock, self._objective.at(weights, state, self.training) as (predict, _):
                return self.values(x, y, *predict_with_logits(self.model, predict, x))

        return backend.jacobian(values, self.training, compiled=not self.model.run_eagerly)


def _owner(variable):
    """Return the path of the layer of a variable."""
    return variable.path.rpartition("/")[0]


def _grouped(sizes, limit):
    """Cut a list of sizes into ranges of at most `limit` together, at least one size each."""
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            groups.append(range(start, i))
            start, total = i, 0
        total += size
    return [*groups, range(start, len(sizes))] if sizes else []


def _gram(matrix, width=2**16):
    """Return matrix @ matrix.T in float64, a few columns at a time."""
    gram = np.zeros((len(matrix), len(matrix)))
    for start in range(0, matrix.shape[1], width):
        columns = matrix[:, start : start + width].astype("float64")
        with np.errstate(invalid="ignore"):  # NaN is reported with its cause by `gamma_hat`
            gram += columns @ columns.T
    return gram
