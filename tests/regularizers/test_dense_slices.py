"""Sub-batches of networks of Dense layers, taken at once, against the same taken in turn.

Tolerance: as in test_sub_batch_perturbation.py, which compares what is taken at once with NumPy.
"""

import keras
import numpy as np
import pytest
from algorithm_1 import ALPHA, assert_same_direction
from frameworks import array, only_on
from keras import layers

from keras_infomcr import RegularizedModel
from keras_infomcr.keras_internals import all_layers
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation, dense_slices


def perceptron(inputs):
    x = layers.Dense(6, "tanh")(layers.Flatten()(inputs))
    return layers.Dense(3)(layers.Dense(4, "gelu", use_bias=False)(x))


def residual(inputs):
    x = layers.Dense(6, "tanh", kernel_regularizer="l2")(layers.Flatten()(inputs))
    y = layers.Dense(6, layers.LeakyReLU())(x)
    return layers.Activation("softplus")(layers.Dense(3)(layers.Add()([x, y])))


def two_heads(inputs):
    x = layers.Dense(6, "tanh")(layers.Flatten()(inputs))
    return [layers.Dense(3)(x), layers.Dense(2, "sigmoid")(x)]


def on_frozen_features(inputs):
    frozen = keras.Sequential([layers.Conv1D(5, 2), layers.BatchNormalization()])
    frozen.trainable = False
    first = layers.Dense(4, "tanh", trainable=False)
    return layers.Dense(3)(first(layers.Flatten()(frozen(inputs))))


NETS = [perceptron, residual, two_heads, on_frozen_features]


def make(net, **options):
    inputs = keras.Input((4, 2))
    model = RegularizedModel(inputs, net(inputs))
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(ALPHA, **options))
    return model


def batch_of(model, rng, size, weighted=True):
    x, *y = (rng.normal(size=(size, *s[1:])) for s in (model.input_shape, *shapes(model)))
    y = list(map(array, y))
    weight = array(rng.uniform(0.2, 3, size=size)) if weighted else None
    return Batch(array(x), y if len(y) > 1 else y[0], weight)


def shapes(model):
    return [output.shape for output in model.outputs]


@pytest.fixture
def in_turn(monkeypatch):
    """Return a function that calls another one where all sub-batches are too long."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(dense_slices, "LONGEST", 0)
            return function()

    return call


@pytest.mark.parametrize(
    ("net", "size", "count", "options"),
    [
        *((net, 7, 3, {}) for net in NETS),
        (perceptron, 8, 4, {}),
        (perceptron, 3, 8, {}),
        (perceptron, 6, 6, {"main_gradient": "full_batch"}),
        (residual, 7, 3, {"num_perturbed": 2}),
    ],
)
@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_at_once_is_in_turn(float64, rng, in_turn, net, size, count, options, weighted):
    model = make(net, num_sub_batches=count, **options)
    assert dense_slices.dense_layers(model)
    batch = batch_of(model, rng, size, weighted)
    objective = Objective(model)
    at_once = model.regularizer(objective, batch, [])
    expected = in_turn(lambda: model.regularizer(objective, batch, []))
    assert_same_direction(at_once.gradient, expected.gradient)
    np.testing.assert_allclose(at_once.value, expected.value, rtol=1e-10)
    if options.get("main_gradient") == "full_batch":
        assert at_once.main is expected.main is None
        return
    assert_same_direction(at_once.main.gradients, expected.main.gradients)
    np.testing.assert_allclose(at_once.main.loss, expected.main.loss, rtol=1e-14)
    for found, other in zip(*(keras.tree.flatten(s.main.predictions) for s in (at_once, expected))):
        np.testing.assert_allclose(found, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "longest",
    # `fit` with batches of unknown size takes the first way in test_sub_batch_perturbation.py, too.
    [pytest.param(100, marks=pytest.mark.slow, id="at-once"), pytest.param(0, id="in-turn")],
)
@only_on("tensorflow", reason="Batches of unknown size are a thing of TensorFlow.")
def test_the_way_is_chosen_in_the_step_where_the_size_is_unknown(
    float64, rng, monkeypatch, longest
):
    import tensorflow as tf

    model = make(perceptron, num_sub_batches=3, num_perturbed=2)
    batch = batch_of(model, rng, 7)
    expected = model.regularizer(Objective(model), batch, [])
    monkeypatch.setattr(dense_slices, "LONGEST", longest)
    unknown = [tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in batch]

    @tf.function(input_signature=unknown, autograph=False)
    def step(*batch):
        found = model.regularizer(Objective(model), Batch(*batch), [])
        return found.value, found.gradient, found.main.gradients, found.main.predictions

    value, gradient, of_main, predictions = step(*batch)
    np.testing.assert_allclose(value, expected.value, rtol=1e-10)
    assert_same_direction(gradient, expected.gradient)
    assert_same_direction(of_main, expected.main.gradients)
    np.testing.assert_allclose(predictions, expected.main.predictions, rtol=1e-12, atol=1e-14)


def shared(inputs):
    dense = layers.Dense(8, "tanh")
    return dense(dense(layers.Flatten()(inputs)))


def sequences(inputs):
    return layers.Dense(3)(inputs)


def convolution(inputs):
    return layers.Dense(3)(layers.Flatten()(layers.Conv1D(3, 2)(inputs)))


def partly_frozen(inputs):
    dense = layers.Dense(3)
    outputs = dense(layers.Flatten()(inputs))
    dense.bias.trainable = False
    return outputs


def low_rank(inputs):
    dense = layers.Dense(3)
    outputs = dense(layers.Flatten()(inputs))
    dense.enable_lora(2)
    return outputs


def normalized(inputs):
    return layers.Dense(3)(layers.BatchNormalization()(layers.Flatten()(inputs)))


def scaled(inputs):
    return layers.Dense(3)(layers.LayerNormalization()(layers.Flatten()(inputs)))


def subclass(inputs):
    class Mine(layers.Dense):
        pass

    return Mine(3)(layers.Flatten()(inputs))


def tied(inputs):
    dense = layers.Dense(5)
    y = dense(layers.Flatten()(inputs))
    return keras.ops.matmul(y, keras.ops.transpose(dense.kernel))


def rematerialized(inputs):
    with keras.RematScope(mode="full"):
        return layers.Dense(3)(layers.Flatten()(inputs))


def nested(inputs):
    return keras.Sequential([layers.Flatten(), layers.Dense(3)])(inputs)


@pytest.mark.parametrize(
    "net",
    [
        shared, sequences, convolution, partly_frozen, low_rank, normalized, scaled, subclass, tied,
        rematerialized, nested,
    ],
)  # fmt: skip
def test_other_networks_are_taken_in_turn(net):
    assert not dense_slices.dense_layers(make(net))


def test_half_precision_is_taken_in_turn():
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert not dense_slices.dense_layers(make(perceptron))


def test_replicas_are_taken_in_turn(mirrored):
    with mirrored.scope():
        assert not dense_slices.dense_layers(make(perceptron))


def test_long_sub_batches_are_taken_in_turn():
    ways = lambda: "at once", lambda: "in turn"
    assert dense_slices.faster_of(*ways, [], 800, 8) == "at once"
    assert dense_slices.faster_of(*ways, [], 801, 8) == "in turn"


def test_layers_are_left_as_they_were(rng):
    model = make(perceptron, num_sub_batches=2)
    attributes = [dict(layer.__dict__) for layer in all_layers(model)]
    model.regularizer(Objective(model), batch_of(model, rng, 4), [])
    with pytest.raises(ValueError, match="shape"):
        model.regularizer(Objective(model), Batch(array(np.ones((4, 9, 9)))), [])
    for layer, before in zip(all_layers(model), attributes):
        assert layer.__dict__.get("call") is before.get("call") is None
        assert layer.__dict__.get("activation") is before.get("activation")
