"""Gram matrices of the gradients of all examples, layer by layer, in one backward pass.

The gradient of m_i by the kernel of a layer is J_i = sum_p a_ip b_ip^T over positions p, with a_ip
what the layer saw and b_ip the gradient of m_i by what it made of that. A tap on the layer's
outputs meets a_ip and b_ip of all examples in the backward pass of sum_i m_i. It returns J J^T as
the "gradient" of an array that it was given, so that no J outlives its layer.
"""

import collections
import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.replaced import replaced

# The rows of a part of a kernel, of all examples, take so many bytes in float64 at most.
_ROW_BYTES = 2**28
# Products of so many columns at once: as fast as can be, for they stay in the processor's cache.
_NUM_COLUMNS = 2**13


class Taps:
    """The layers of a model whose Gram matrices come from one backward pass.

    Args:
        model: A built `keras.Model`.

    Attributes:
        layers: List of the layers. Every evaluation within `noting` may shorten it.
    """

    def __init__(self, model):
        with backend.float64_allowed():
            double = backend.widest_float() == "float64"
        self._known = [
            layer
            for layer in model._flatten_layers()
            if double
            and type(layer) in _KINDS
            and layer.variable_dtype in ("float32", "float64")
            and getattr(layer, "groups", 1) == 1
            and getattr(layer, "_remat_mode", None) is None  # `keras.RematScope`
        ]
        self._trainable = {id(v) for v in model.trainable_variables}
        self._read_elsewhere = set()
        self._readers = {}
        self._first_rows = collections.defaultdict(list)
        self.layers = self._known

    @contextlib.contextmanager
    def noting(self, scope, num_examples):
        """Drop layers that an evaluation of so many examples calls otherwise than once for all.

        Args:
            scope: The `keras.StatelessScope` of the evaluation.
            num_examples: Integer.
        """
        calls, inside = collections.Counter(), [None]

        def noting_call(layer, call):
            def noted(inputs, *args, **kwargs):
                inside.append(layer)
                try:
                    outputs = call(inputs, *args, **kwargs)
                finally:
                    inside.pop()
                # Sparse inputs have no `ndim`. What is traced may be a loop's body, which runs
                # more often than it is called.
                usual = (
                    hasattr(inputs, "ndim")
                    and not backend.is_traced(outputs)
                    and inputs.shape[0] == outputs.shape[0] == num_examples
                )
                if usual:
                    first = (ops.convert_to_numpy(array[0]) for array in (inputs, outputs))
                    self._first_rows[layer].append(tuple(first))
                calls[layer] += 1 if usual and not kwargs.get("training") else 2
                return outputs

            return noted

        value_of = scope.get_current_value

        def noting_value(variable):
            owner = inside[-1]
            own = owner is not None and any(variable is v for v in owner.variables)
            if not own or self._readers.setdefault(id(variable), owner) is not owner:
                self._read_elsewhere.add(id(variable))
            return value_of(variable)

        scope.get_current_value = noting_value
        with _calls_replaced(self._known, noting_call):
            yield
        self.layers = [x for x in self.layers if calls[x] == 1 and self._names(x)]

    def coupled(self):
        """Return whether a layer saw another first example in one evaluation than in another.

        Rounding is a thousand times smaller than the limit, what couples examples larger.
        """
        with np.errstate(invalid="ignore"):
            return any(
                np.max(np.abs(array - other)) > 1e-3 * np.max(np.abs(array))
                for first, *others in self._first_rows.values()
                for rows in others
                for array, other in zip(first, rows)
            )

    def weights(self, layer):
        """Return the trainable variables of a tapped layer that its Gram matrix takes in."""
        return [getattr(layer, name) for name in self._names(layer)]

    def _names(self, layer):
        values = {name: getattr(layer, name, None) for name in _KINDS[type(layer)].weights}
        taken = self._trainable - self._read_elsewhere
        return [k for k, v in values.items() if isinstance(v, keras.Variable) and id(v) in taken]

    def open(self, probes):
        """Return a context in which the layers are tapped.

        Args:
            probes: List of arrays `[N, N]` of zeros, float64, one for each of `layers`: their
                gradients will be the Gram matrices.
        """
        probes = dict(zip(self.layers, probes))

        def tapped_call(layer, call):
            def tapped(inputs, *args, **kwargs):
                activation = getattr(layer, "activation", None)
                with replaced(layer, "activation", None):
                    outputs = call(inputs, *args, **kwargs)
                outputs = _tap(layer, self._names(layer), inputs, outputs, probes[layer])
                return outputs if activation is None else activation(outputs)

            return tapped

        return _calls_replaced(self.layers, tapped_call)


@contextlib.contextmanager
def _calls_replaced(layers, replacement):
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, "call", replacement(layer, layer.call)))
        yield


def _tap(layer, names, inputs, outputs, probe):
    grams_of = _KINDS[type(layer)].grams_of(layer)

    @ops.custom_gradient
    def identity(outputs, inputs, probe):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            with backend.float64_allowed():
                grams = grams_of(backend.after(inputs, upstream), upstream)
                total = sum(grams[name]() for name in names)
            none = ops.broadcast_to(ops.zeros((), inputs.dtype), inputs.shape)
            # One layer at a time: the next one's gradients wait.
            return backend.after(upstream, total), none, total

        return ops.copy(outputs), gradient  # torch lets nobody change an input in place

    return identity(outputs, ops.stop_gradient(ops.cast(inputs, outputs.dtype)), probe)


def _dense(layer):
    return lambda inputs, upstream: _affine_grams([_by_position(inputs)], _by_position(upstream))


def _convolution(layer):
    # Not the layer itself: TensorFlow never forgets a gradient function, nor what it refers to.
    kernel_size, padding = layer.kernel_size, layer.padding
    strides, dilations = layer.strides, layer.dilation_rate
    channels_first = layer.data_format == "channels_first"

    def grams(inputs, upstream):
        if channels_first:
            inputs, upstream = (ops.moveaxis(array, 1, -1) for array in (inputs, upstream))
        sizes = upstream.shape[1:-1]
        axes = list(zip(sizes, strides, dilations))
        zeros = [
            _padding(padding, size, kernel, *axis)
            for size, kernel, axis in zip(inputs.shape[1:-1], kernel_size, axes)
        ]
        inputs = ops.pad(inputs, [(0, 0), *zeros, (0, 0)])
        # What each entry of the kernel saw: a slice of the inputs.
        columns = [
            inputs[(slice(None), *map(_seen, offset, axes))]
            for offset in itertools.product(*map(range, kernel_size))
        ]
        return _affine_grams([_by_position(c) for c in columns], _by_position(upstream))

    return grams


def _seen(k, axis):
    size, stride, dilation = axis
    return slice(k * dilation, k * dilation + (size - 1) * stride + 1, stride)


def _padding(padding, size, kernel, size_of_outputs, stride, dilation):
    """Return the numbers of zeros before and after the entries of an axis."""
    reach = (kernel - 1) * dilation
    if padding == "causal":
        return reach, 0
    if padding == "valid":
        return 0, 0
    total = max((size_of_outputs - 1) * stride + reach + 1 - size, 0)
    return total // 2, total - total // 2


def _batch_normalization(layer):
    axis, mean = layer.axis, layer.moving_mean.value
    scale = ops.rsqrt(layer.moving_variance.value + layer.epsilon)

    def grams(inputs, upstream):
        rest = [k for k in range(1, inputs.ndim) if k != axis % inputs.ndim]
        bias = ops.sum(upstream, rest)
        return {
            "gamma": lambda: gram(scale * (ops.sum(inputs * upstream, rest) - mean * bias)),
            "beta": lambda: gram(bias),
        }

    return grams


class _Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        grams_of: Function of a layer, called in the forward pass. It returns a function of the
            layer's inputs and the gradients by its outputs, and that a function without arguments
            for each weight, which returns the Gram matrix.
        weights: Tuple of the names of the weights.
    """

    grams_of: Callable
    weights: tuple


_CONVOLUTION = _Kind(_convolution, ("kernel", "bias"))
_KINDS = {
    keras.layers.Dense: _Kind(_dense, ("kernel", "bias")),
    keras.layers.Conv1D: _CONVOLUTION,
    keras.layers.Conv2D: _CONVOLUTION,
    keras.layers.Conv3D: _CONVOLUTION,
    keras.layers.BatchNormalization: _Kind(_batch_normalization, ("gamma", "beta")),
}


def gram(rows):
    """Return rows rows^T, of shape `[N, N]`, of rows `[N, W]`, computed in float64."""
    with backend.float64_allowed():
        parts = (
            ops.cast(rows[:, k : k + _NUM_COLUMNS], "float64")
            for k in range(0, rows.shape[1], _NUM_COLUMNS)
        )
        return sum(part @ ops.transpose(part) for part in parts)


def _affine_grams(columns, upstream):
    """Return what gives the Gram matrices of a kernel and a bias.

    Args:
        columns: List of arrays `[N, P, I]`, the a_ip of each entry of the kernel.
        upstream: Array `[N, P, O]`, the b_ip.

    Returns:
        Dictionary of functions that take no argument.
    """
    return {
        "kernel": lambda: _kernel_gram(columns, upstream),
        "bias": lambda: gram(ops.sum(upstream, 1)),
    }


def _kernel_gram(columns, upstream):
    n, p, o = upstream.shape
    i = columns[0].shape[-1]
    if p * p * (i + o) <= i * o and 8 * (n * p) ** 2 <= _ROW_BYTES:
        # J_i . J_j = sum_pq (a_ip . a_jq) (b_ip . b_jq), without J.
        of_columns = sum(gram(ops.reshape(c, (n * p, i))) for c in columns)
        products = of_columns * gram(ops.reshape(upstream, (n * p, o)))
        return ops.sum(ops.reshape(products, (n, p, n, p)), (1, 3))
    width = max(1, _ROW_BYTES // (8 * n * o))
    return sum(
        gram(ops.reshape(ops.transpose(c[..., k : k + width], (0, 2, 1)) @ upstream, (n, -1)))
        for c in columns
        for k in range(0, i, width)
    )


def _by_position(array):
    """Return an array `[N, ..., C]` as `[N, P, C]`."""
    return ops.reshape(array, (array.shape[0], -1, array.shape[-1]))
