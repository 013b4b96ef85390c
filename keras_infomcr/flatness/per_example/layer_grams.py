"""The kinds of layers whose gradients of all examples follow from inputs and output gradients.

The gradient of m_i by a kernel is J_i = sum_p a_ip b_ip^T over positions p, with a_ip the inputs of
the layer at that position and b_ip the gradient of m_i by its outputs there.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_infomcr.flatness.per_example.convolution_kinds import CONVOLUTIONS
from keras_infomcr.flatness.per_example.gradient_parts import (
    Kind,
    Rows,
    affine_parts,
    by_position,
)


def _dense(layer: keras.layers.Dense) -> Callable:
    return lambda inputs, upstream: affine_parts([by_position(inputs)], by_position(upstream))


def _batch_normalization(layer: keras.layers.BatchNormalization) -> Callable:
    # In inference mode, in which the statistics are constants. Arrays, not the layer itself:
    # TensorFlow never forgets a gradient function, nor the objects that it refers to, and would
    # keep the model alive.
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


KINDS = {
    keras.layers.Dense: Kind(_dense, ("kernel", "bias")),
    keras.layers.BatchNormalization: Kind(_batch_normalization, ("gamma", "beta")),
    **CONVOLUTIONS,
}
