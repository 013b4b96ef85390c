"""The gradients by the weights of convolutions."""

import itertools
from collections.abc import Callable

import keras
from keras import ops

from keras_infomcr.flatness.per_example.gradient_parts import Kind, affine_parts, by_position


def _convolution(layer: keras.Layer) -> Callable:
    # Numbers, not the layer itself: TensorFlow never forgets a gradient function, nor the objects
    # that it refers to, and would keep the model alive.
    kernel_size, padding = layer.kernel_size, layer.padding
    strides, dilations = layer.strides, layer.dilation_rate
    channels_first = layer.data_format == "channels_first"

    def parts(inputs, upstream):
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
        return affine_parts([by_position(c) for c in columns], by_position(upstream))

    return parts


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


_CONVOLUTION = Kind(_convolution, ("kernel", "bias"), lambda layer: layer.groups == 1)
CONVOLUTIONS = {
    keras.layers.Conv1D: _CONVOLUTION,
    keras.layers.Conv2D: _CONVOLUTION,
    keras.layers.Conv3D: _CONVOLUTION,
}
