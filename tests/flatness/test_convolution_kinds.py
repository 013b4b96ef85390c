"""The gradients of single examples by the weights of convolutions, against Jacobians."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, jacobian, numpy
from keras import layers, ops
from nets import NUM_CLASSES, sequential

from keras_infomcr import backend
from keras_infomcr.flatness import gamma_hat_by_layer
from keras_infomcr.flatness.per_example.gradient_parts import gram_of_calls
from keras_infomcr.flatness.per_example.layer_grams import KINDS

FIRST = {"data_format": "channels_first"}
# The shape of an example, and a layer. Axes have sizes of which no stride is a divisor.
LAYERS = [
    ((8, 4), layers.Conv1D, dict(filters=6, kernel_size=3, groups=2)),
    ((8, 4), layers.Conv1D, dict(filters=4, kernel_size=3, groups=4, padding="causal", strides=2)),
    ((5, 7, 6), layers.Conv2D, dict(filters=6, kernel_size=(2, 3), groups=3, padding="same")),
    ((3, 4, 3, 4), layers.Conv3D, dict(filters=4, kernel_size=2, groups=2, use_bias=False)),
    ((8, 3), layers.DepthwiseConv1D, dict(kernel_size=3, depth_multiplier=2, padding="same")),
    ((9, 3), layers.DepthwiseConv1D, dict(kernel_size=3, dilation_rate=2)),
    ((6, 7, 3), layers.DepthwiseConv2D, dict(kernel_size=3, strides=2, padding="same")),
    ((5, 6, 2), layers.DepthwiseConv2D, dict(kernel_size=(2, 3), depth_multiplier=3)),
    ((7, 6, 2), layers.DepthwiseConv2D, dict(kernel_size=2, dilation_rate=2, padding="same")),
    ((8, 3), layers.SeparableConv1D, dict(filters=5, kernel_size=3, strides=2, padding="same")),
    ((9, 3), layers.SeparableConv1D, dict(filters=2, kernel_size=2, dilation_rate=3)),
    ((6, 7, 3), layers.SeparableConv2D, dict(filters=5, kernel_size=3, depth_multiplier=2)),
    ((6, 7, 2), layers.SeparableConv2D, dict(filters=3, kernel_size=(3, 2), padding="same")),
    ((5, 3), layers.Conv1DTranspose, dict(filters=4, kernel_size=3, strides=2)),
    ((5, 3), layers.Conv1DTranspose, dict(filters=2, kernel_size=2, strides=3, padding="same")),
    ((4, 5, 3), layers.Conv2DTranspose, dict(filters=4, kernel_size=(3, 4), padding="same")),
    ((4, 5, 3), layers.Conv2DTranspose, dict(filters=4, kernel_size=4, strides=2, padding="same")),
    ((4, 5, 3), layers.Conv2DTranspose, dict(filters=4, kernel_size=3, strides=(2, 1))),
    ((3, 4, 2), layers.Conv2DTranspose, dict(filters=2, kernel_size=3, strides=2, padding="same")),
    ((3, 2, 3, 2), layers.Conv3DTranspose, dict(filters=3, kernel_size=2, strides=2)),
    ((5,), layers.PReLU, {}),
    ((4, 3, 2), layers.PReLU, dict(shared_axes=[1, 2])),
    ((4, 3, 2), layers.PReLU, dict(shared_axes=[2])),
]
PADDED = dict(filters=3, kernel_size=3, strides=3, padding="same", output_padding=1)
LAYERS += [
    ((4, 2), layers.Conv1DTranspose, PADDED),
    ((4, 2), layers.Conv1DTranspose, PADDED | {"padding": "valid"}),
    ((4, 2), layers.Conv1DTranspose, PADDED | {"kernel_size": 4}),
]
# TensorFlow has these on GPUs only.
LAYERS_OF_CHANNELS_FIRST = [
    ((4, 5, 3), layers.Conv2D, dict(filters=6, kernel_size=2, groups=2)),
    ((2, 6, 7), layers.DepthwiseConv2D, dict(kernel_size=3, padding="same", depth_multiplier=2)),
    ((2, 6, 7), layers.SeparableConv2D, dict(filters=3, kernel_size=3, padding="same")),
    ((3, 4, 5), layers.Conv2DTranspose, dict(filters=4, kernel_size=3, strides=2, padding="same")),
]
if BACKEND != "tensorflow":
    LAYERS.append(((5, 3), layers.Conv1DTranspose, dict(filters=4, kernel_size=3, dilation_rate=2)))
    LAYERS += [(shape, cls, kwargs | FIRST) for shape, cls, kwargs in LAYERS_OF_CHANNELS_FIRST]


@pytest.mark.parametrize("shape, cls, kwargs", LAYERS)
def test_kinds_against_jacobians(float64, rng, shape, cls, kwargs):
    """Each Gram matrix by itself."""
    layer = cls(**kwargs)
    inputs = ops.convert_to_tensor(rng.normal(size=(4, *shape)))
    outputs = layer(inputs)
    for v in layer.trainable_variables:
        v.assign(rng.normal(size=v.shape))
    upstream = ops.convert_to_tensor(rng.normal(size=outputs.shape))
    kind = KINDS[cls]
    parts = kind.parts_of(layer)(inputs, upstream)
    for name in kind.weights:
        weight = getattr(layer, name)
        if weight is not None:
            axes = list(range(1, outputs.ndim))
            rows = jacobian(lambda: ops.sum(upstream * layer(inputs), axes), [weight])  # noqa: B023
            expected = rows @ rows.T
            found = numpy(gram_of_calls([parts[name]()]))
            # Rounding is relative to the largest gradients.
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.max(expected))
