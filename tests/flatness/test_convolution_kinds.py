"""The gradients of single examples by the weights of convolutions, against Jacobians."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, jacobian, numpy
from keras import layers, ops
from measuring import measure
from nets import NUM_CLASSES, misfits, sequential
from oracles import ln_xi

from keras_infomcr import backend
from keras_infomcr.flatness.per_example.gradient_parts import gram_of_calls
from keras_infomcr.flatness.per_example.layer_kinds import kind_of


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


FIRST = {"data_format": "channels_first"}
# The shape of an example, a layer and its arguments.
LAYERS = [
    ((8, 4), layers.Conv1D, dict(filters=6, kernel_size=3, groups=2)),
    slow(
        (8, 4), layers.Conv1D, dict(filters=4, kernel_size=3, groups=4, padding="causal", strides=2)
    ),
    slow((5, 7, 6), layers.Conv2D, dict(filters=6, kernel_size=(2, 3), groups=3, padding="same")),
    slow((3, 4, 3, 4), layers.Conv3D, dict(filters=4, kernel_size=2, groups=2, use_bias=False)),
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
    """The Gram matrix by each weight."""
    layer = cls(**kwargs)
    inputs = ops.convert_to_tensor(rng.normal(size=(4, *shape)))
    outputs = layer(inputs)
    for v in layer.trainable_variables:
        v.assign(rng.normal(size=v.shape))
    upstream = ops.convert_to_tensor(rng.normal(size=outputs.shape))
    parts = kind_of(layer).parts_of(layer)(inputs, upstream)
    axes = list(range(1, outputs.ndim))
    for v in layer.trainable_variables:
        rows = jacobian(lambda: ops.sum(upstream * layer(inputs), axes), [v])
        found = numpy(gram_of_calls([parts[v.name]()]))
        # Rounding is relative to the largest product.
        expected, largest = rows @ rows.T, np.max(rows @ rows.T)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * largest)


@misfits
def test_a_network_of_all_kinds(float64, rng, monkeypatch):
    """Activations, one pass in place of a Jacobian, and nothing that couples examples."""
    model = sequential(
        layers.Reshape((5, 4, 3)),
        layers.DepthwiseConv2D(2, depth_multiplier=2, activation="tanh", use_bias=False),
        layers.SeparableConv2D(4, 2, padding="same", activation="tanh"),
        layers.PReLU(shared_axes=[1]),
        layers.Conv2DTranspose(3, 3, strides=2, activation="tanh"),
        layers.Flatten(),
        layers.Dense(NUM_CLASSES),
        inputs=(60,),
    )
    for v in model.variables:
        v.assign(rng.normal(size=v.shape))
    x, y = rng.normal(size=(4, 60)), rng.integers(0, NUM_CLASSES, 4)

    def logits_of_true():
        outputs = model(x)
        true = ops.cast(ops.one_hot(y, NUM_CLASSES), outputs.dtype)
        return ops.sum(outputs * true, -1) - ops.logsumexp(ops.where(true > 0, -1e9, outputs), -1)

    rows = jacobian(logits_of_true, model.trainable_variables)
    expected = ln_xi(rows) - 2 * np.sum(np.logaddexp(0, numpy(logits_of_true())))
    # The gradients of single examples are not formed.
    monkeypatch.setattr(backend, "gradients_by_example", lambda *args, **kwargs: None)
    assert measure(model, x, y).value == pytest.approx(expected, rel=1e-9)


def test_outputs_cut_at_the_other_end(monkeypatch, rng):
    """What old versions of Keras did on torch."""
    layer = layers.Conv1DTranspose(2, 4, strides=3, padding="same")
    layer.build((None, 3, 1))
    assert kind_of(layer) is not None
    transposed = keras.ops.conv_transpose

    def other_end(*args):
        return ops.roll(transposed(*args), 1, axis=1)

    monkeypatch.setattr(keras.ops, "conv_transpose", other_end)
    assert kind_of(layer) is None
