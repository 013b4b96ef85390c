"""`backend.Trainer` among the bases of a model."""

import keras
import numpy as np
import pytest
from parameters import slow_but

from keras_infomcr import RegularizedModel, backend

X = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 2)).astype("float32")
WEIGHTS = np.linspace(0.5, 2.0, 10)


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3, "tanh", kernel_regularizer=keras.regularizers.L2(0.1))
        self.dropout = keras.layers.Dropout(0.3, seed=3)
        self.norm = keras.layers.BatchNormalization()
        self.out = keras.layers.Dense(2)

    def call(self, x, training=None):
        x = self.norm(self.hidden(x), training=training)
        return self.out(self.dropout(x, training=training))


class Stepping(backend.Trainer, Net):
    """Takes Keras's training step by the methods of the trainer."""

    def train_step(self, *args):
        def step(data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            y_pred, gradients = self._main_pass(x, y, sample_weight)
            self._apply_gradients(gradients)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

        return self._call_step(step, *args)


def adam():
    return keras.optimizers.Adam(0.01)


def clipped():
    return keras.optimizers.SGD(0.1, clipnorm=0.1, use_ema=True)


def accumulating():
    return keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)


def scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))


@pytest.mark.parametrize(
    "optimizer",
    slow_but([adam, clipped, accumulating, scaled], accumulating),
)
def test_main_pass_and_optimizer_step_are_those_of_keras(optimizer):
    found = []
    for base in (Net, Stepping):
        keras.utils.set_random_seed(0)
        model = base()
        model.compile(optimizer(), "mse", metrics=["mae"])
        settings = {"sample_weight": WEIGHTS, "shuffle": False, "verbose": 0}
        logs = model.fit(X, Y, 4, epochs=2, **settings).history
        found.append([*model.get_weights(), *logs.values()])
    for a, b in zip(*found):
        # The same operations; XLA and the like may fuse them in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_trainer_stands_before_that_of_keras():
    bases = RegularizedModel.__mro__
    assert bases.index(backend.Trainer) < bases.index(keras.Model)


def test_variables_of_a_step_are_no_weights():
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    ours = {id(v) for v in model._variables_in_step()}
    assert ours
    assert not ours & {id(v) for v in model.variables}
