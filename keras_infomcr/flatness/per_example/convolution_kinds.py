"""The gradients by the weights of convolutions and of PReLU, which often follows them."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.per_example.gradient_parts import Kind, Outer, Rows, by_position

# The functions below keep numbers and arrays of a layer, not the layer itself: TensorFlow never
# forgets a gradient function, nor the objects that it refers to, and would keep the model alive.


class _Window(NamedTuple):
    """How the entries of a kernel move over the positions of an array."""

    kernel_size: tuple[int, ...]
    padding: str
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, layer: keras.Layer) -> "_Window":
        """Return the window of a convolution."""
        return cls(layer.kernel_size, layer.padding, layer.strides, layer.dilation_rate)

    def depthwise(self, array: Any, kernel: Any) -> Any:
        """Return the depthwise convolution of an array `[N, ..., C]`."""
        return ops.depthwise_conv(
            array, kernel, self.strides, self.padding, "channels_last", self.dilations
        )

    def slices(self, array: Any, sizes: tuple[int, ...]) -> list:
        """Return the slices that the entries of the kernel meet, one for each entry.

        Args:
            array: Array `[N, ..., C]`.
            sizes: Tuple of integers, how often the window moves along each axis.
        """
        axes = list(zip(sizes, self.strides, self.dilations))
        zeros = [
            _padding(self.padding, size, kernel, *axis)
            for size, kernel, axis in zip(array.shape[1:-1], self.kernel_size, axes)
        ]
        array = ops.pad(array, [(0, 0), *zeros, (0, 0)])
        # TensorFlow takes ten times as long for slices in strides.
        phases = [
            (size,) if stride == 1 else (size // stride, stride)
            for size, stride in zip(array.shape[1:-1], self.strides)
        ]
        array = ops.reshape(array, (array.shape[0], *itertools.chain(*phases), array.shape[-1]))
        return [
            array[(slice(None), *itertools.chain(*map(_seen, entry, axes)))]
            for entry in itertools.product(*map(range, self.kernel_size))
        ]


def _seen(k: int, axis: tuple[int, int, int]) -> tuple:
    """Return the positions of an axis that the kernel's entry `k` meets, and their phase."""
    size, stride, dilation = axis
    start, phase = divmod(k * dilation, stride)
    positions = slice(start, start + size)
    return (positions,) if stride == 1 else (positions, phase)


def _padding(
    padding: str, size: int, kernel: int, num_moves: int, stride: int, dilation: int
) -> tuple[int, int]:
    """Return the numbers of zeros before and after the positions of an axis.

    With them, the length of the axis is a multiple of the stride.
    """
    reach = (kernel - 1) * dilation
    before = 0
    if padding == "causal":
        before = reach
    elif padding == "same":
        before = max((num_moves - 1) * stride + reach + 1 - size, 0) // 2
    needed = max((num_moves - 1) * stride + reach + 1, before + size)
    return before, needed + -needed % stride - before - size


def _convolution(layer: keras.Layer) -> Callable:
    window, groups = _Window.of(layer), layer.groups

    def parts(inputs, upstream):
        columns = window.slices(inputs, upstream.shape[1:-1])
        outer = Outer([_by_group(c, groups) for c in columns], _by_group(upstream, groups))
        return {"kernel": lambda: [outer]}

    return parts


def _by_group(array: Any, groups: int) -> Any:
    """Return an array `[N, ..., C]` as `[N, P, C]`, or `[N, G, P, C / G]` with several groups."""
    array = by_position(array)
    if groups == 1:
        return array
    return ops.swapaxes(ops.reshape(array, (*array.shape[:2], groups, -1)), 1, 2)


def _transposed_convolution(layer: keras.Layer) -> Callable:
    window = _Window.of(layer)

    def parts(inputs, upstream):
        # The window moves over the outputs, once for each position of the inputs.
        columns = window.slices(upstream, inputs.shape[1:-1])
        return {"kernel": lambda: [Outer([by_position(c) for c in columns], by_position(inputs))]}

    return parts


def _is_transposed(layer: keras.Layer) -> bool:
    """Return whether the outputs are cut where a convolution would have padded its inputs.

    Old versions of Keras cut some of them at the other end on torch.
    """
    window, sizes = _Window.of(layer), [3] * len(layer.kernel_size)
    settings = layer.strides, layer.padding, layer.output_padding, "channels_last"
    with backend.float64_allowed():
        inputs, kernel = _numbers(1, *sizes, 1), _numbers(*layer.kernel_size, 1, 1)
        outputs = ops.conv_transpose(inputs, kernel, *settings, layer.dilation_rate)
        upstream = _numbers(*outputs.shape)
        slopes = [ops.sum(inputs * column) for column in window.slices(upstream, sizes)]
        values = ops.sum(upstream * outputs), ops.sum(ops.stack(slopes) * ops.ravel(kernel))
        return np.isclose(*map(ops.convert_to_numpy, values))


def _numbers(*shape: int) -> Any:
    return ops.cos(ops.reshape(ops.arange(math.prod(shape), dtype="float64"), shape))


def _depthwise_convolution(layer: keras.Layer) -> Callable:
    window = _Window.of(layer)
    return lambda inputs, upstream: {"kernel": lambda: [_by_depth(window, inputs, upstream)]}


def _by_depth(window: _Window, inputs: Any, upstream: Any) -> Rows:
    """Return the gradients by a depthwise kernel."""
    _, *sizes, channels = upstream.shape
    if channels != inputs.shape[-1]:  # several channels of the outputs for each of the inputs
        inputs = ops.repeat(inputs, channels // inputs.shape[-1], axis=-1)
    positions = list(range(1, 1 + len(sizes)))
    rows = [ops.sum(column * upstream, positions) for column in window.slices(inputs, sizes)]
    return Rows(ops.concatenate(rows, axis=1))


def _separable_convolution(layer: keras.Layer) -> Callable:
    window = _Window.of(layer)
    depthwise, pointwise = layer.depthwise_kernel.value, layer.pointwise_kernel.value

    def parts(inputs, upstream):
        dtype = upstream.dtype
        kernel = ops.cast(pointwise, dtype)

        def by_depthwise_kernel():
            between = upstream @ ops.transpose(ops.reshape(kernel, (-1, kernel.shape[-1])))
            return [_by_depth(window, inputs, between)]

        def by_pointwise_kernel():
            between = window.depthwise(inputs, ops.cast(depthwise, dtype))
            return [Outer([by_position(between)], by_position(upstream))]

        return {
            "depthwise_kernel": by_depthwise_kernel,
            "pointwise_kernel": by_pointwise_kernel,
        }

    return parts


def _kind(parts_of: Callable, *weights: str, fits: Callable = lambda layer: True) -> Kind:
    """Return a kind of convolution.

    Args:
        parts_of: As for `Kind`, for all weights but the bias, and for channels last.
        *weights: Their names.
        fits: As for `Kind`.
    """

    def parts_of_all(layer):
        channels_first, parts = layer.data_format == "channels_first", parts_of(layer)

        def parts_and_bias(inputs, upstream):
            if channels_first:
                inputs, upstream = (ops.moveaxis(array, 1, -1) for array in (inputs, upstream))

            def by_bias():
                return [Rows(ops.sum(by_position(upstream), 1))]

            return {**parts(inputs, upstream), "bias": by_bias}

        return parts_and_bias

    return Kind(parts_of_all, (*weights, "bias"), fits)


def _prelu(layer: keras.layers.PReLU) -> Callable:
    shape = layer.alpha.shape

    def parts(inputs, upstream):
        shared = [axis for axis, size in enumerate(shape, 1) if size == 1]
        rows = upstream * ops.minimum(inputs, 0)
        rows = ops.sum(rows, shared) if shared else rows
        return {"alpha": lambda: [Rows(ops.reshape(rows, (rows.shape[0], -1)))]}

    return parts


_CONVOLUTION = _kind(_convolution, "kernel")
_DEPTHWISE = _kind(_depthwise_convolution, "kernel")
_SEPARABLE = _kind(_separable_convolution, "depthwise_kernel", "pointwise_kernel")
_TRANSPOSED = _kind(_transposed_convolution, "kernel", fits=_is_transposed)
CONVOLUTIONS = {
    keras.layers.Conv1D: _CONVOLUTION,
    keras.layers.Conv2D: _CONVOLUTION,
    keras.layers.Conv3D: _CONVOLUTION,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
    keras.layers.Conv1DTranspose: _TRANSPOSED,
    keras.layers.Conv2DTranspose: _TRANSPOSED,
    keras.layers.Conv3DTranspose: _TRANSPOSED,
    keras.layers.PReLU: Kind(_prelu, ("alpha",)),
}
