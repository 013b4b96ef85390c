"""A model as a function of its weights."""

import keras
import numpy as np
import pytest
from frameworks import array, numpy

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Batch, Objective


class Penalized(keras.layers.Layer):
    """A layer with a penalty on a weight of its own, and a loss that it adds."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", regularizer="l2")

    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.ones_like(inputs)) / 4)
        return self.scale * inputs


def outputs_of(inputs):
    dense = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(100.0))
    return dense(Penalized()(inputs))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.scale = Penalized()
        self.dense = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(100.0))

    def call(self, inputs):
        return self.dense(self.scale(inputs))


def functional(base):
    inputs = keras.Input((4,))
    return base(inputs, outputs_of(inputs))


@pytest.mark.parametrize(
    "build",
    [
        lambda: functional(keras.Model),
        lambda: functional(RegularizedModel),
        lambda: keras.Sequential([keras.Input((4,)), functional(keras.Model)]),
        Subclassed,
        lambda: RegularizedModel.from_model(Subclassed()),
    ],
    ids=["keras.Model", "RegularizedModel", "nested", "subclassed", "wrapped"],
)
def test_weight_penalties_are_no_part_of_the_objective(rng, build):
    """With L2(100), weight penalties would add some 100 to a mean squared error of order one."""
    model = build()
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 3)).astype("float32")
    model.compile("sgd", "mse")
    predictions = model.predict(x, verbose=0)
    objective = Objective(model)
    loss, _ = objective(objective.weights(), objective.state(), Batch(array(x), array(y)))
    # The loss that the layer adds counts. Float32 rounds a mean of 18 terms.
    np.testing.assert_allclose(numpy(loss), np.mean((predictions - y) ** 2) + 0.25, rtol=1e-5)
    penalties = [float(numpy(v.regularizer(v))) for v in model.trainable_variables if v.regularizer]
    assert sum(penalties) > 10


def test_weight_penalties_are_left_as_they_were(rng):
    model = functional(keras.Model)
    model.compile("sgd", "mse")
    before = [v.regularizer for v in model.trainable_variables]
    objective = Objective(model)
    batch = Batch(array(rng.normal(size=(6, 4)), "float32"), array(rng.normal(size=(6, 3))))
    objective(objective.weights(), objective.state(), batch)
    assert all(v.regularizer is r for v, r in zip(model.trainable_variables, before))


def test_a_loss_at_the_address_of_one_long_gone_counts(rng):
    """Keras notes by their address which of a layer's losses it has collected.

    A new loss may come to lie where an old one lay. Here every address counts as noted until the
    notes are cleared, so that a loss is left out unless the objective clears them.
    """

    class EveryAddress(set):
        gone = False

        def __contains__(self, address):
            return not self.gone or super().__contains__(address)

        def clear(self):
            self.gone = True

    batch = Batch(array(rng.normal(size=(6, 4)), "float32"), array(rng.normal(size=(6, 3))))

    def loss():
        value, _ = objective(objective.weights(), objective.state(), batch)
        return float(numpy(value))

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, activity_regularizer="l2")(inputs))
    model.compile("sgd", "mse")
    objective = Objective(model)
    before = loss()
    ids = [EveryAddress() for _ in model.layers]
    for layer, addresses in zip(model.layers, ids):
        object.__setattr__(layer, "_loss_ids", addresses)
    assert loss() == before
    assert all(addresses.gone for addresses in ids)


def test_iterating_over_sub_batches_ends(rng):
    x = rng.normal(size=(7, 2)).astype("float32")
    parts = list(Objective(keras.Model()).sub_batches(Batch(array(x)), 3))
    assert [weight for weight, _ in parts] == [6 / 7, 6 / 7, 9 / 7]
    np.testing.assert_array_equal(np.concatenate([numpy(batch.x) for _, batch in parts]), x)
