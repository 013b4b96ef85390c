"""The gradients by the weights of layers that normalise: outputs = gamma * normalised + beta."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_infomcr.flatness.per_example.gradient_parts import Kind, Rows

# No function below may keep the layer itself: TensorFlow never forgets a gradient function, nor the
# objects that it refers to, and would keep the model alive.


def _batch(layer: keras.layers.BatchNormalization) -> Callable:
    # In inference mode, in which the statistics are constants.
    axis, mean = layer.axis, layer.moving_mean.value
    scale = ops.rsqrt(layer.moving_variance.value + layer.epsilon)

    def parts(inputs, upstream):
        rest = [k for k in range(1, inputs.ndim) if k != axis % inputs.ndim]
        bias = ops.sum(upstream, rest)
        return {
            "gamma": lambda: [Rows(scale * (ops.sum(inputs * upstream, rest) - mean * bias))],
            "beta": lambda: [Rows(bias)],
        }

    return parts


def _layer(layer: keras.layers.LayerNormalization) -> Callable:
    axes, epsilon = _as_list(layer.axis), layer.epsilon
    centred = not getattr(layer, "rms_scaling", False)

    def parts(inputs, upstream):
        variance = ops.var(inputs, axes, keepdims=True)  # with `rms_scaling` too
        mean = ops.mean(inputs, axes, keepdims=True) if centred else 0
        return _scale_and_offset((inputs - mean) * ops.rsqrt(variance + epsilon), upstream, axes)

    return parts


def _rms(layer: keras.Layer) -> Callable:
    axes, epsilon = _as_list(layer.axis), layer.epsilon

    def parts(inputs, upstream):
        square = ops.mean(ops.square(inputs), axes, keepdims=True)
        return _scale_and_offset(inputs * ops.rsqrt(square + epsilon), upstream, axes)

    return parts


def _group(layer: keras.layers.GroupNormalization) -> Callable:
    axis, groups, epsilon = layer.axis, layer.groups, layer.epsilon

    def parts(inputs, upstream):
        channels_last = ops.moveaxis(inputs, axis, -1)
        by_group = ops.reshape(channels_last, (*channels_last.shape[:-1], groups, -1))
        rest = [k for k in range(1, by_group.ndim) if k != by_group.ndim - 2]
        variance = ops.var(by_group, rest, keepdims=True)
        normalized = by_group - ops.mean(by_group, rest, keepdims=True)
        normalized = ops.reshape(normalized * ops.rsqrt(variance + epsilon), channels_last.shape)
        return _scale_and_offset(normalized, ops.moveaxis(upstream, axis, -1), [-1])

    return parts


def _scale_and_offset(normalized: Any, upstream: Any, axes: list[int]) -> dict[str, Callable]:
    """Return functions that give the parts of weights that have some axes of the outputs."""
    own = [axis % upstream.ndim for axis in axes]
    rest = [k for k in range(1, upstream.ndim) if k not in own]

    def by(array):
        array = ops.sum(array, rest) if rest else array
        return [Rows(ops.reshape(array, (array.shape[0], -1)))]

    def of_scale():
        return by(normalized * upstream)

    return {"gamma": of_scale, "scale": of_scale, "beta": lambda: by(upstream)}


def _as_list(axis: Any) -> list[int]:
    return [axis] if isinstance(axis, int) else list(axis)


NORMALIZATIONS = {
    keras.layers.BatchNormalization: Kind(_batch, ("gamma", "beta")),
    keras.layers.LayerNormalization: Kind(_layer, ("gamma", "beta")),
    keras.layers.RMSNormalization: Kind(_rms, ("scale",)),
    keras.layers.GroupNormalization: Kind(_group, ("gamma", "beta")),
}
