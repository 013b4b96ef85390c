"""Small networks of many kinds, compiled, whose gradients tests know how to form."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_infomcr import RegularizedModel

NUM_CLASSES = 4


# Networks whose large logits are wrong about random labels.
misfits = pytest.mark.filterwarnings("ignore:The model does not fit the measured examples")


def from_logits():
    """Return a new loss, for losses compute in the precision that they were made under."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def binary_from_logits():
    return keras.losses.BinaryCrossentropy(from_logits=True)


def compiled(model, loss=None, **kwargs):
    model.compile("sgd", loss or from_logits(), **kwargs)
    return model


def sequential(*stack, inputs=(6,), loss=None):
    return compiled(keras.Sequential([keras.Input(inputs), *stack]), loss)


def classifier(loss=None, **kwargs):
    """Return a net of two layers, the second made with `kwargs`."""
    last = layers.Dense(NUM_CLASSES, bias_initializer="normal", **kwargs)
    return sequential(layers.Dense(8, "tanh", bias_initializer="normal"), last, loss=loss)


class Subclassed(keras.Model):
    """A `call` without a `training` argument, and a layer it does not reach."""

    def __init__(self):
        super().__init__()
        self.dense, self.last = layers.Dense(8, "tanh"), layers.Dense(NUM_CLASSES)
        self.unreached = layers.Dense(2)
        self.unreached.build((None, 6))

    def call(self, inputs):
        return self.last(self.dense(inputs))


def of_subclass():
    model = Subclassed()
    model(np.zeros((1, 6)))
    return model


def of_convolutions():
    stack = [layers.Reshape((3, 2, 1)), layers.Conv2D(3, 2, padding="same", use_bias=False)]
    stack += [layers.BatchNormalization(), layers.Activation("gelu")]
    stack += [layers.DepthwiseConv2D(2), layers.Flatten(), layers.Dense(NUM_CLASSES)]
    return sequential(*stack)


def of_batch_normalization():
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.Activation("tanh")]
    return sequential(*stack, layers.Dense(NUM_CLASSES))


def of_shared_and_nested_layers():
    inputs = keras.Input((6,))
    shared = layers.Dense(6, "tanh")
    inner = keras.Sequential([layers.LayerNormalization(), layers.Dense(NUM_CLASSES)])
    return RegularizedModel(inputs, inner(shared(shared(inputs))))


def of_recurrence():
    return sequential(layers.Reshape((3, 2)), layers.LSTM(5), layers.Dense(NUM_CLASSES))


def of_frozen_layer():
    model = classifier()
    model.layers[0].trainable = False
    return model


def of_dict_inputs():
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((6,), name="b")}
    joined = layers.Dense(5, "tanh")(inputs["a"]) * layers.Dense(5)(inputs["b"])
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(joined))


def of_two_inputs():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.Concatenate()(inputs)))


def of_integers():
    stack = [layers.Embedding(7, 3), layers.Flatten(), layers.Dense(NUM_CLASSES)]
    return sequential(*stack)
