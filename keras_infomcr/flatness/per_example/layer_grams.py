"""Gram matrices of the gradients of all examples by the weights of one layer.

The gradient of m_i by a kernel is J_i = sum_p a_ip b_ip^T over positions p, with a_ip the inputs of
the layer at that position and b_ip the gradient of m_i by its outputs there.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_infomcr import backend

# The rows of all examples by a part of a kernel take at most so many bytes in float64. Kernels with
# more entries are taken part by part: a whole Jacobian of a wide layer may not fit into memory.
_ROW_BYTES = 2**28
# Products of so many columns at once stay in the processor's cache, and were the fastest.
_NUM_COLUMNS = 2**13


def _dense(layer: keras.layers.Dense) -> Callable:
    return lambda inputs, upstream: _affine_grams([_by_position(inputs)], _by_position(upstream))


def _convolution(layer: keras.Layer) -> Callable:
    # Numbers, not the layer itself: TensorFlow never forgets a gradient function, nor the objects
    # that it refers to, and would keep the model alive.
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
        # Each entry of the kernel is multiplied with a slice of the inputs.
        columns = [
            inputs[(slice(None), *map(_seen, offset, axes))]
            for offset in itertools.product(*map(range, kernel_size))
        ]
        return _affine_grams([_by_position(c) for c in columns], _by_position(upstream))

    return grams


def _seen(k: int, axis: tuple[int, int, int]) -> slice:
    """Return the entries of an axis of the inputs that the kernel's entry `k` meets."""
    size, stride, dilation = axis
    return slice(k * dilation, k * dilation + (size - 1) * stride + 1, stride)


def _padding(
    padding: str, size: int, kernel: int, size_of_outputs: int, stride: int, dilation: int
) -> tuple[int, int]:
    """Return the numbers of zeros before and after the entries of an axis."""
    reach = (kernel - 1) * dilation
    if padding == "causal":
        return reach, 0
    if padding == "valid":
        return 0, 0
    total = max((size_of_outputs - 1) * stride + reach + 1 - size, 0)
    return total // 2, total - total // 2


def _batch_normalization(layer: keras.layers.BatchNormalization) -> Callable:
    # In inference mode, in which the statistics are constants.
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
            layer's inputs and the gradients by its outputs, which returns for each weight's name
            a function of no arguments, which returns the Gram matrix.
        weights: Tuple of the names of the weights.
    """

    grams_of: Callable
    weights: tuple[str, ...]


_CONVOLUTION = _Kind(_convolution, ("kernel", "bias"))
KINDS = {
    keras.layers.Dense: _Kind(_dense, ("kernel", "bias")),
    keras.layers.Conv1D: _CONVOLUTION,
    keras.layers.Conv2D: _CONVOLUTION,
    keras.layers.Conv3D: _CONVOLUTION,
    keras.layers.BatchNormalization: _Kind(_batch_normalization, ("gamma", "beta")),
}


def gram(rows: Any) -> Any:
    """Return rows rows^T, of shape `[N, N]`, of rows `[N, W]`, computed in float64."""
    with backend.float64_allowed():
        parts = (
            ops.cast(rows[:, k : k + _NUM_COLUMNS], "float64")
            for k in range(0, rows.shape[1], _NUM_COLUMNS)
        )
        return sum(part @ ops.transpose(part) for part in parts)


def _affine_grams(columns: list, upstream: Any) -> dict[str, Callable]:
    """Return functions that compute the Gram matrices of a kernel and a bias.

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


def _kernel_gram(columns: list, upstream: Any) -> Any:
    n, p, o = upstream.shape
    i = columns[0].shape[-1]
    if p * p * (i + o) <= i * o and 8 * (n * p) ** 2 <= _ROW_BYTES:
        # Few positions: J_i . J_j = sum_pq (a_ip . a_jq) (b_ip . b_jq) takes fewer operations than
        # J, which is not formed.
        of_columns = sum(gram(ops.reshape(c, (n * p, i))) for c in columns)
        products = of_columns * gram(ops.reshape(upstream, (n * p, o)))
        return ops.sum(ops.reshape(products, (n, p, n, p)), (1, 3))
    # J itself, as many input channels of it at a time as fit into the limit.
    width = max(1, _ROW_BYTES // (8 * n * o))
    return sum(
        gram(ops.reshape(ops.transpose(c[..., k : k + width], (0, 2, 1)) @ upstream, (n, -1)))
        for c in columns
        for k in range(0, i, width)
    )


def _by_position(array: Any) -> Any:
    """Return an array `[N, ..., C]` as `[N, P, C]`."""
    return ops.reshape(array, (array.shape[0], -1, array.shape[-1]))
