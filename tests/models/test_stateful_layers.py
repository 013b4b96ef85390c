"""Stateful recurrent layers, which carry a state for each row of a batch to the next batch."""

import keras
import numpy as np
import pytest
from frameworks import only_on

from keras_infomcr import RegularizedModel

X, Y = np.ones((4, 3, 2), "float32"), np.ones((4, 2), "float32")
MESSAGE = r"must not be stateful.*Received: layers with stateful=True \['lstm'\]"


class Net(RegularizedModel):
    def __init__(self):
        super().__init__()
        self.lstm = keras.layers.LSTM(2, stateful=True, name="lstm")

    def call(self, inputs):
        return self.lstm(inputs)


def test_they_are_refused():
    inputs = keras.Input(batch_shape=(4, 3, 2))
    model = RegularizedModel(inputs, keras.layers.LSTM(2, stateful=True, name="lstm")(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=MESSAGE):
        model.fit(X, Y, batch_size=4, verbose=0)


@only_on("tensorflow", reason="other backends of Keras fail to build such a model in `fit`")
def test_they_are_refused_where_they_come_later():
    model = Net()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=MESSAGE):
        model.fit(X, Y, batch_size=4, verbose=0)


@only_on("tensorflow", "jax", reason="Keras cannot train stateful recurrent layers on torch")
def test_without_a_regulariser_keras_trains_them():
    model = Net()
    model(X)
    model.compile("sgd", "mse", regularizer=None)
    assert np.isfinite(model.fit(X, Y, batch_size=4, verbose=0).history["loss"][0])
