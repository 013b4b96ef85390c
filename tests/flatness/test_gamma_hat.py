"""gamma-hat against hand-written Jacobians and SVD, in float64 and in half precision.

Every test that names no trial draws one trial of all examples, so that the reference needs no
order: the determinant does not depend on it.
"""

import math
import warnings

import keras
import numpy as np
import pytest
from frameworks import array, only_on
from keras import layers, ops
from measuring import measure
from nets import (
    NUM_CLASSES,
    binary_from_logits,
    classifier,
    compiled,
    from_logits,
    misfits,
    of_batch_normalization,
    of_convolutions,
    of_dict_inputs,
    of_frozen_layer,
    of_integers,
    of_recurrence,
    of_shared_and_nested_layers,
    of_subclass,
    of_two_inputs,
    sequential,
)
from oracles import binary_log_loss_of, ln_xi, log_loss_of, rounding, rows_of_losses
from parameters import with_slow

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness.per_example import trial_grams
from keras_infomcr.layers import LogitNormalization


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


# ---------------------------------------------------------------- the value, in float64


@pytest.mark.parametrize("num_examples", [1, 2, 12])
def test_two_layer_net_against_hand_written_backpropagation(float64, data, num_examples):
    x, y = (a[:num_examples] for a in data)
    model = classifier()
    kernel1, bias1, kernel2, bias2 = (v.numpy() for v in model.trainable_variables)
    hidden = np.tanh(x @ kernel1 + bias1)
    logits = hidden @ kernel2 + bias2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    at_logits = probabilities - np.eye(NUM_CLASSES)[y]
    at_hidden = at_logits @ kernel2.T * (1 - hidden**2)
    rows = [
        [np.outer(a, d).ravel(), d, np.outer(h, e).ravel(), e]
        for a, d, h, e in zip(x, at_hidden, hidden, at_logits)
    ]
    rows = np.array([np.concatenate(row) for row in rows])
    result = measure(model, x, y)
    assert result.value == pytest.approx(ln_xi(rows), rel=1e-9)
    true = probabilities[np.arange(num_examples), y]
    assert result.log_loss_part == pytest.approx(2 * np.sum(np.log1p(-true)), rel=1e-12)
    assert result.value == result.trials[0] == result.log_loss_part + result.geometry_part


@pytest.mark.parametrize(
    ("make", "inputs_of", "chunk_size"),
    [
        (classifier, lambda x: x, None),
        (of_subclass, lambda x: x, None),
        (of_convolutions, lambda x: x, None),
        pytest.param(of_convolutions, lambda x: x, 5, marks=pytest.mark.slow),
        (of_shared_and_nested_layers, lambda x: x, None),
        pytest.param(of_recurrence, lambda x: x, None, marks=pytest.mark.slow),
        pytest.param(of_recurrence, lambda x: x, 5, marks=pytest.mark.slow),
        (of_frozen_layer, lambda x: x, None),
        (of_dict_inputs, lambda x: {"a": x, "b": x[::-1] + 1}, None),
        (of_two_inputs, lambda x: [x, x[::-1] + 1], None),
        (of_integers, lambda x: np.digitize(x, np.linspace(-1, 1, 6)), None),
        (classifier, lambda x: np.digitize(x, np.linspace(-1, 1, 6)), None),
    ],
)
@misfits
def test_models_of_all_kinds_against_svd(float64, data, make, inputs_of, chunk_size):
    x, y = inputs_of(data[0]), data[1]
    model = compiled(make())
    model(x, training=True)  # moves the statistics of batch normalisation
    expected = ln_xi(rows_of_losses(model, x, log_loss_of(y)))
    assert measure(model, x, y, chunk_size=chunk_size).value == pytest.approx(expected, rel=1e-9)


class Branching(keras.Model):
    """Looks at its numbers, which works eagerly alone."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(NUM_CLASSES)

    def call(self, inputs):
        return self.dense(inputs) * (2.0 if float(keras.ops.sum(inputs)) > 0 else 1.0)


@only_on("tensorflow", "torch", reason="Keras traces every model on JAX, to build it")
@pytest.mark.slow
def test_model_that_runs_eagerly(float64, data):
    x, y = data
    model = compiled(Branching(), run_eagerly=True)
    model.fit(x, y, verbose=0)
    rows = [rows_of_losses(model, x[i : i + 1], log_loss_of(y[i : i + 1])) for i in range(12)]
    assert measure(model, x, y).value == pytest.approx(ln_xi(np.concatenate(rows)), rel=1e-9)


@pytest.mark.parametrize("loss", ["from_logits", "of_probabilities"])
def test_binary_cross_entropy_against_svd(float64, data, loss):
    x, y = data[0], data[1] % 2
    logits = sequential(layers.Dense(8, "tanh"), layers.Dense(1), loss=binary_from_logits())
    expected = rows_of_losses(logits, x, binary_log_loss_of(y))
    model = logits
    if loss == "of_probabilities":
        model = sequential(*logits.layers, layers.Activation("sigmoid"), loss="binary_crossentropy")
    result = measure(model, x, y)
    assert result.value == pytest.approx(ln_xi(expected), rel=1e-9)
    # |dl/dz| = 1 - p of the true class: the rows' norms are the derivatives by the last bias.
    assert result.log_loss_part == pytest.approx(2 * np.sum(np.log(abs(expected[:, -1]))), rel=1e-9)


def mean_square(y, outputs):
    return ops.mean(ops.square(outputs - y), axis=-1)


def mean_binary(y, outputs):
    return ops.mean(ops.binary_crossentropy(y, outputs, from_logits=True), axis=-1)


def fourth_power(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


of_other_losses = pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")


@of_other_losses
@pytest.mark.parametrize(
    ("loss", "losses_of", "base"),
    [
        (lambda: "mse", mean_square, keras.Model),
        pytest.param(lambda: "mse", mean_square, RegularizedModel, marks=pytest.mark.slow),
        (lambda: keras.losses.MeanSquaredError(reduction="sum"), mean_square, keras.Model),
        (binary_from_logits, mean_binary, keras.Model),  # several labels an example
        (lambda: fourth_power, fourth_power, RegularizedModel),
    ],
    ids=["mse", "regularized", "sum", "multi-label", "function"],
)
def test_any_other_loss_against_svd(float64, data, rng, loss, losses_of, base):
    """Rows are the gradients of the loss itself, without weight penalties, on any model."""
    x, y = data[0], rng.integers(0, 2, (12, NUM_CLASSES)).astype("float64")
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2(0.1))(inputs)
    model = compiled(base(inputs, layers.Dense(NUM_CLASSES)(hidden)), loss())
    expected = ln_xi(rows_of_losses(model, x, lambda outputs: losses_of(array(y), outputs)))
    result = measure(model, x, y)
    assert result.value == pytest.approx(expected, rel=1e-9)
    assert result.log_loss_part == 0
    assert model.layers[1].kernel.regularizer is not None


def test_two_outputs_against_svd(float64, data):
    x, y = data
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh")(inputs)
    model = keras.Model(inputs, [layers.Dense(6)(hidden), layers.Dense(NUM_CLASSES)(hidden)])
    compiled(model, ["mse", from_logits()], loss_weights=[0.5, 2])
    expected = rows_of_losses(
        model, x, lambda z: 0.5 * mean_square(array(x), z[0]) + 2 * log_loss_of(y)(z[1])
    )
    assert measure(model, x, [x, y]).value == pytest.approx(ln_xi(expected), rel=1e-9)


def test_one_loss_for_two_outputs_against_svd(float64, data):
    x, y = data
    inputs = keras.Input((6,))
    model = compiled(keras.Model(inputs, [layers.Dense(NUM_CLASSES)(inputs) for _ in range(2)]))
    expected = rows_of_losses(model, x, lambda z: log_loss_of(y)(z[0]) + log_loss_of(y)(z[1]))
    assert measure(model, x, [y, y]).value == pytest.approx(ln_xi(expected), rel=1e-9)


def test_one_output_in_a_dict(data):
    x, y = data
    inputs = keras.Input((6,))
    outputs = layers.Dense(NUM_CLASSES)(inputs)
    plain = compiled(keras.Model(inputs, outputs))
    named = compiled(keras.Model(inputs, {"a": outputs}), {"a": from_logits()})
    expected = measure(plain, x, y).value
    assert measure(named, x, {"a": y}).value == pytest.approx(expected, rel=1e-6)


def test_a_weight_of_many_entries_against_svd(float64, rng):
    """The Gram matrix is summed over blocks of 2^16 columns."""
    x, y = rng.normal(size=(4, 1100)), rng.integers(0, 60, 4)
    model = sequential(layers.Dense(60), inputs=(1100,))
    expected = ln_xi(rows_of_losses(model, x, log_loss_of(y)))
    assert measure(model, x, y).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("training", with_slow([False, True], True))
def test_weights_in_groups_do_not_change_the_value(float64, data, monkeypatch, training):
    model = of_batch_normalization()
    settings = {"training": training, "chunk_size": 6, "seed": 0}
    expected = measure(model, *data, **settings)
    monkeypatch.setattr(trial_grams, "_ROW_BYTES", 4 * 12 * 50)  # at most 50 numbers at once
    model.compile("sgd", from_logits())  # drops what was compiled for larger groups
    result = measure(model, *data, **settings)
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    assert result.log_loss_part == pytest.approx(expected.log_loss_part, rel=1e-12)


# ---------------------------------------------------------------- labels and last activations


@pytest.mark.parametrize(
    "loss",
    [
        lambda: "sparse_categorical_crossentropy",
        pytest.param(lambda: keras.losses.sparse_categorical_crossentropy, marks=pytest.mark.slow),
        pytest.param(keras.losses.SparseCategoricalCrossentropy, marks=pytest.mark.slow),
        lambda: keras.losses.SparseCategoricalCrossentropy(ignore_class=-1),
        pytest.param(lambda: "CategoricalCrossentropy", marks=pytest.mark.slow),
        lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        pytest.param(lambda: [keras.losses.CategoricalCrossentropy()], marks=pytest.mark.slow),
    ],
    ids=["name", "function", "class", "ignore_class", "class name", "smoothing", "list"],
)
def test_cross_entropy_by_any_name(float64, data, loss):
    model = classifier(activation="softmax", loss=loss())
    logits = classifier()
    logits.set_weights(model.get_weights())
    expected = ln_xi(rows_of_losses(logits, data[0], log_loss_of(data[1])))
    assert measure(model, *data).value == pytest.approx(expected, rel=1e-9)


def test_integer_one_hot_and_soft_labels_agree(data, rng):
    x, y = data
    model = classifier()
    value = measure(model, x, y).value
    one_hot = np.eye(NUM_CLASSES)[y]
    soft = 0.6 * one_hot + 0.4 * rng.dirichlet(np.ones(NUM_CLASSES), 12)
    for labels in (y[:, None].astype("float32"), one_hot, soft):
        # The same graph on the same numbers.
        assert measure(model, x, labels).value == pytest.approx(value, rel=1e-6)


def test_binary_labels_of_any_kind_agree(data, rng):
    x, y = data[0], data[1] % 2
    model = sequential(layers.Dense(8, "tanh"), layers.Dense(1), loss=binary_from_logits())
    value = measure(model, x, y).value
    for labels in (y[:, None].astype(bool), 0.2 + 0.6 * y):
        assert measure(model, x, labels).value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "stack",
    [
        lambda: [layers.Dense(4, "softmax")],
        lambda: [layers.Dense(4), layers.Softmax()],
        lambda: [keras.Sequential([layers.Dense(4, "softmax")])],
    ],
    ids=["argument", "layer", "nested"],
)
@misfits
def test_softmax_is_looked_behind(data, stack):
    """Saturated probabilities tell nothing, the logits behind them do."""
    x, y = data
    logits = sequential(layers.Dense(4))
    logits.set_weights([1000 * w for w in logits.get_weights()])
    model = sequential(*stack(), loss="sparse_categorical_crossentropy")
    model.set_weights(logits.get_weights())
    value = measure(logits, x, y).value
    assert measure(model, x, y).value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", with_slow(["softmax", "sigmoid"], "sigmoid"))
def test_other_probabilities_are_taken_as_such_with_one_warning(float64, data, monkeypatch, kind):
    monkeypatch.setattr(trial_grams, "_ROW_BYTES", 1)  # many compiled functions, still one warning
    x, y = data
    units, loss, labels = 4, "sparse_categorical_crossentropy", y
    if kind == "sigmoid":
        units, loss, labels = 1, "binary_crossentropy", y % 2
    x, labels = x[:6], labels[:6]
    model = sequential(layers.Dense(units, kind), layers.Rescaling(1.0), loss=loss)
    expected = measure(sequential(model.layers[0], loss=loss), x, labels).value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = measure(model, x, labels, chunk_size=4)
    assert len(caught) == 1
    assert "its outputs are taken as probabilities p and its logits as ln p" in str(
        caught[0].message
    )
    # ln p of probabilities between 1e-3 and 1 - 1e-3 loses three digits of sixteen.
    assert result.value == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- normalised logits


@pytest.mark.parametrize("scale", [pytest.param(0.5, marks=pytest.mark.slow), 2.0])
def test_normalised_against_svd(float64, data, scale):
    """At norm 2 and 0.5 losses are far from vanishing, so that SVD keeps its digits."""
    x, y = data
    model = classifier()
    normalised = sequential(*model.layers, LogitNormalization(scale))
    expected = ln_xi(rows_of_losses(normalised, x, log_loss_of(y)))
    result = measure(model, x, y, normalize_softmax=True, softmax_scale=scale)
    assert result.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("activation", [None, "softmax"])
@misfits
def test_normalised_by_the_option_or_by_the_layer(float64, data, activation):
    loss = "sparse_categorical_crossentropy" if activation else None
    model = classifier(activation=activation, loss=loss)
    logits = classifier()
    logits.set_weights(model.get_weights())
    by_layer = measure(sequential(*logits.layers, LogitNormalization()), *data)
    by_option = measure(model, *data, normalize_softmax=True)
    assert by_option.value == pytest.approx(by_layer.value, rel=1e-9)


@misfits
def test_normalised_value_does_not_see_the_scale_of_the_last_layer(float64, data):
    x, y = data
    model = sequential(layers.Dense(NUM_CLASSES, use_bias=False))
    value = measure(model, x, y, normalize_softmax=True).value
    model.set_weights([8 * w for w in model.get_weights()])
    scaled = measure(model, x, y, normalize_softmax=True).value
    # z / ||z|| of 8 W is the same function with gradients 8 times smaller, in all 12 rows.
    assert scaled == pytest.approx(value - 2 * 12 * math.log(8), rel=1e-9)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("policy", "training"), [("mixed_float16", True), ("mixed_bfloat16", False)]
)
def test_mixed_precision_policies_agree_with_float32(data, policy, training):
    x, y = data
    model = of_batch_normalization()
    keras.config.set_dtype_policy(policy)
    mixed = of_batch_normalization()
    mixed.set_weights(model.get_weights())
    expected = measure(model, x, y, training=training).value
    value = measure(mixed, x, y, training=training).value
    # The same numbers in the same float32: an eighth of bfloat16's unit would show.
    assert value == pytest.approx(expected, abs=1e-3)
    assert {layer.dtype_policy.name for layer in mixed.layers} == {policy}


@pytest.mark.parametrize(("policy", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_weights(data, policy, unit):
    x, y = data[0][:3], data[1][:3]
    keras.config.set_dtype_policy(policy)
    model = classifier()
    keras.config.set_dtype_policy("float32")
    single = classifier()
    single.set_weights([w.astype("float32") for w in model.get_weights()])
    rows = rows_of_losses(single, x, log_loss_of(y))
    tolerance = rounding(rows, unit)
    assert measure(model, x, y).value == pytest.approx(ln_xi(rows), abs=tolerance)
