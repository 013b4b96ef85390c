"""gamma-hat against hand-written Jacobians, SVD, extended precision and the reference's code.

Every test that names no trial draws one trial of all examples, so that the reference needs no
order: the determinant does not depend on it.
"""

import dataclasses
import itertools
import math
import random
import re
import warnings

import keras
import mpmath
import numpy as np
import pytest
from frameworks import BACKEND, array, global_random_number, jacobian, numpy, only_on, tensorflow
from keras import layers, ops

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness import GammaHat, gamma_hat
from keras_infomcr.flatness.per_example import trial_grams
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.layers import LogitNormalization

NUM_CLASSES = 4
EPSILON32 = np.finfo("float32").eps

# Networks whose large logits are wrong about random labels.
misfits = pytest.mark.filterwarnings("ignore:The model does not fit the measured examples")


def from_logits():
    """Return a new loss, for losses compute in the precision that they were made under."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def binary_from_logits():
    return keras.losses.BinaryCrossentropy(from_logits=True)


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def compiled(model, loss=None, **kwargs):
    model.compile("sgd", loss or from_logits(), **kwargs)
    return model


def sequential(*stack, inputs=(6,), loss=None):
    return compiled(keras.Sequential([keras.Input(inputs), *stack]), loss)


def classifier(loss=None, **kwargs):
    """Return a net of two layers, the second made with `kwargs`."""
    last = layers.Dense(NUM_CLASSES, bias_initializer="normal", **kwargs)
    return sequential(layers.Dense(8, "tanh", bias_initializer="normal"), last, loss=loss)


def measure(model, x, y, **kwargs):
    """Measure one trial of all examples."""
    num_examples = len(keras.tree.flatten(x)[0])
    return gamma_hat(model, x, y, num_examples=num_examples, num_trials=1, **kwargs)


def rows_of_losses(model, x, losses_of, training=False):
    """Return the Jacobian of `losses_of(outputs)`, of shape `[n]`, with respect to the weights."""
    return jacobian(lambda: losses_of(model(x, training=training)), model.trainable_variables)


def ln_xi(rows):
    """Return ln|J J^T|: the sum of the logarithms of the squared singular values."""
    return 2 * np.sum(np.log(np.linalg.svd(rows.astype("float64"), compute_uv=False)))


def log_loss_of(y):
    return lambda logits: ops.sparse_categorical_crossentropy(y, logits, from_logits=True)


def binary_log_loss_of(y):
    y = np.reshape(y, (-1, 1)).astype(keras.config.floatx())
    return lambda logits: ops.binary_crossentropy(y, logits, from_logits=True)[:, 0]


def rounding(rows, epsilon, depth=10):
    """Bound the change of ln|J J^T| when every row is rounded `depth` times.

    d ln|J J^T| = 2 tr(dJ J^+), at most 2 N ||dJ|| / sigma_min for rows of norm 1.
    """
    unit_rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    smallest = np.linalg.svd(unit_rows.astype("float64"), compute_uv=False)[-1]
    return 2 * len(rows) * math.sqrt(len(rows)) * depth * epsilon / smallest


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


@pytest.mark.parametrize(
    ("make", "inputs_of", "chunk_size"),
    [
        (classifier, lambda x: x, None),
        (of_subclass, lambda x: x, None),
        (of_convolutions, lambda x: x, None),
        (of_convolutions, lambda x: x, 5),
        (of_shared_and_nested_layers, lambda x: x, None),
        (of_recurrence, lambda x: x, None),
        (of_recurrence, lambda x: x, 5),
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
        (lambda: "mse", mean_square, RegularizedModel),
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


@pytest.mark.parametrize("training", [False, True])
def test_weights_in_groups_do_not_change_the_value(float64, data, monkeypatch, training):
    model = of_batch_normalization()
    settings = {"training": training, "chunk_size": 6, "seed": 0}
    expected = measure(model, *data, **settings)
    monkeypatch.setattr(trial_grams, "_ROW_BYTES", 4 * 12 * 50)  # at most 50 numbers at once
    result = measure(model, *data, **settings)
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    assert result.log_loss_part == pytest.approx(expected.log_loss_part, rel=1e-12)


# ---------------------------------------------------------------- labels and last activations


@pytest.mark.parametrize(
    "loss",
    [
        lambda: "sparse_categorical_crossentropy",
        lambda: keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy,
        lambda: keras.losses.SparseCategoricalCrossentropy(ignore_class=-1),
        lambda: "CategoricalCrossentropy",
        lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        lambda: [keras.losses.CategoricalCrossentropy()],
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


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
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


@pytest.mark.parametrize("scale", [0.5, 2.0])
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


# ---------------------------------------------------------------- saturation, in float32


def dyadic(rng, *shape):
    """Return multiples of 1/8 up to 1, of which float32 makes exact logits."""
    return rng.integers(-8, 9, shape) / 8


def extended_ln_xi(x, at_logits):
    """Return ln|J J^T| of a linear model with bias, rows x (+) 1 times dl/dlogits, by mpmath."""
    n = len(x)
    gram = mpmath.matrix(n)
    for i, j in itertools.product(range(n), repeat=2):
        inner = sum(a * b for a, b in zip(at_logits[i], at_logits[j]))
        gram[i, j] = inner * (mpmath.mpf(float(x[i] @ x[j])) + 1)
    logarithm = mpmath.mpf(0)
    for k in range(n):  # Gaussian elimination: its pivots are positive, and no scale too small
        logarithm += mpmath.log(gram[k, k])
        for i, j in itertools.product(range(k + 1, n), repeat=2):
            gram[i, j] -= gram[i, k] / gram[k, k] * gram[k, j]
    return logarithm


def categorical_case(rng):
    x, y = dyadic(rng, 8, 10), rng.integers(0, 5, 8)
    kernel, bias = 1000 * dyadic(rng, 10, 5), 1000 * dyadic(rng, 5)
    logits = x @ kernel + bias
    y[:6] = logits[:6].argmax(axis=1)  # six fitted as after training, two at random
    at_logits = []
    for row, c in zip(logits, y):
        powers = [mpmath.exp(float(z)) for z in row]
        p = [power / sum(powers) for power in powers]
        # p_c - 1 written as the sum of the others, of which nothing cancels.
        p[c] = -sum(q for k, q in enumerate(p) if k != c)
        at_logits.append(p)
    return x, y, kernel, bias, at_logits


def binary_case(rng):
    x, y = dyadic(rng, 8, 10), rng.integers(0, 2, 8)
    kernel, bias = 1000 * dyadic(rng, 10, 1), 1000 * dyadic(rng, 1)
    logits = (x @ kernel + bias)[:, 0]
    y[:6] = logits[:6] > 0
    signs = [-1 if label else 1 for label in y]
    at_logits = [[s / (1 + mpmath.exp(-s * float(z)))] for s, z in zip(signs, logits)]
    return x, y, kernel, bias, at_logits


@pytest.mark.parametrize("ending", ["logits", "probabilities"])
@pytest.mark.parametrize("case", [categorical_case, binary_case])
@misfits
def test_saturation_against_extended_precision(rng, case, ending):
    """Logits times 1000: the losses are exp(-1000) and their gradients 0 in float32."""
    x, y, kernel, bias, at_logits = case(rng)
    with mpmath.workdps(60):
        expected = float(extended_ln_xi(x, at_logits))
        log_losses = 2 * sum(mpmath.log(max(abs(a) for a in row)) for row in at_logits)
    categorical = case is categorical_case
    activation, loss = None, from_logits() if categorical else binary_from_logits()
    if ending == "probabilities":
        activation = "softmax" if categorical else "sigmoid"
        loss = "sparse_categorical_crossentropy" if categorical else "binary_crossentropy"
    model = sequential(layers.Dense(kernel.shape[1], activation), inputs=(10,), loss=loss)
    model.set_weights([kernel, bias])
    result = measure(model, x, y)
    # The logits are exact in float32, so the log-odds are right to float64's last digits.
    assert result.log_loss_part == pytest.approx(float(log_losses), rel=1e-12)
    # The rows grad m are x times softmax weights, rounded to float32 once or twice.
    weights = np.array([[float(a / max(map(abs, row))) for a in row] for row in at_logits])
    with_bias = np.hstack([x, np.ones((8, 1))])
    rows = (with_bias[:, :, None] * weights[:, None, :]).reshape(8, -1)
    tolerance = rounding(rows, EPSILON32, depth=2)
    assert tolerance < 1e-3
    assert result.value == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("case", [categorical_case, binary_case])
def test_naive_form_fails_at_saturation(rng, case):
    """Gradients of float32 losses vanish: the test above does not pass by luck."""
    x, y, kernel, bias, at_logits = case(rng)
    with mpmath.workdps(60):
        expected = float(extended_ln_xi(x, at_logits))
    model = sequential(layers.Dense(kernel.shape[1]), inputs=(10,))
    model.set_weights([kernel, bias])
    losses_of = log_loss_of(y) if case is categorical_case else binary_log_loss_of(y)
    rows = rows_of_losses(model, x, losses_of)
    with np.errstate(divide="ignore"):
        assert ln_xi(rows) != pytest.approx(expected, rel=0.1)


def test_normalised_logits_in_float32_agree_with_float64(data, request):
    """Logits of norm 25 put p_c within 1e-8 of 1, where float32 has no digits left."""
    model = classifier()
    single = measure(model, *data, normalize_softmax=True).value
    request.getfixturevalue("float64")
    double = classifier()
    double.set_weights(model.get_weights())
    expected = measure(double, *data, normalize_softmax=True).value
    normalised = sequential(*double.layers, LogitNormalization(1.0))
    rows = rows_of_losses(normalised, data[0], log_loss_of(data[1]))
    # 12 log-odds err by some 10 roundings of 25, the rows by as many of softmax's argument.
    tolerance = 2 * 12 * 10 * 25 * EPSILON32 + rounding(rows, EPSILON32, depth=25)
    assert single == pytest.approx(expected, abs=tolerance)
    assert tolerance < 0.1


# ---------------------------------------------------------------- training mode, in chunks


def value_of_the_reference_code(model, x, y, trials, scale=None):
    """Return what src/eval_cifar10.py of InfoMCR does with batches of 10 images.

    The mean over trials of the sum of ln singular values of the Jacobian of all losses, the
    model called in training mode on chunks of 10.
    """

    def losses(logits, labels):
        if scale is not None:
            logits = logits / (ops.norm(logits, axis=-1, keepdims=True) * scale)
        return ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)

    sums = []
    for rows in trials:
        chunks = rows.reshape(-1, 10)
        jacobians = [
            rows_of_losses(model, x[c], lambda z, c=c: losses(z, y[c]), training=True)
            for c in chunks
        ]
        sums.append(np.sum(np.log(np.linalg.svd(np.concatenate(jacobians), compute_uv=False))))
    return np.mean(sums)


def of_batch_normalization():
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.Activation("tanh")]
    return sequential(*stack, layers.Dense(NUM_CLASSES))


@pytest.mark.parametrize(
    ("make", "scale"),
    [(of_batch_normalization, 0.5), (of_convolutions, None)],
)
def test_training_in_chunks_of_10_is_the_reference_codes_convention(float64, rng, make, scale):
    x, y = rng.normal(size=(40, 6)), rng.integers(0, NUM_CLASSES, 40)
    model = make()
    estimator = GammaHatEstimator(
        model,
        x,
        y,
        num_examples=20,
        num_trials=2,
        relative_tolerance=0.01,
        normalize_softmax=scale is not None,
        softmax_scale=scale or 0.04,
        training=True,
        chunk_size=10,
        seed=0,
    )
    result = GammaHat.of(estimator.measure())
    expected = value_of_the_reference_code(model, x, y, estimator._trials, scale)
    assert result.value / 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "inputs_of"),
    [(of_batch_normalization, np.float32), (of_integers, lambda x: np.digitize(x, [-1, 0, 1]))],
)
def test_training_in_float32(data, make, inputs_of):
    x, y = inputs_of(data[0][:8]), data[1][:8]
    model = make()
    rows = rows_of_losses(model, x, log_loss_of(y), training=True)
    # Batch normalisation divides differences of like size: some 50 roundings in all.
    tolerance = rounding(rows, EPSILON32, depth=50)
    assert measure(model, x, y, training=True).value == pytest.approx(ln_xi(rows), abs=tolerance)
    assert tolerance < 0.1


def test_binary_loss_in_training_mode_against_svd(float64, data):
    x, y = data[0], data[1] % 2
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.Activation("tanh")]
    model = sequential(*stack, layers.Dense(1), loss=binary_from_logits())
    expected = ln_xi(rows_of_losses(model, x, binary_log_loss_of(y), training=True))
    assert measure(model, x, y, training=True).value == pytest.approx(expected, rel=1e-9)


def test_chunks_do_not_change_the_value_where_no_layer_couples_them(float64, data):
    model = classifier()
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    for training, chunk_size in ((False, 1), (False, 100), (True, 5), (True, None)):
        result = measure(model, *data, training=training, chunk_size=chunk_size)
        assert result.value == pytest.approx(expected, rel=1e-9)


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


# ---------------------------------------------------------------- data


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, num_batches):
        super().__init__()
        self.x, self.y, self._num_batches = x, y, num_batches

    @property
    def num_batches(self):
        return self._num_batches

    def __getitem__(self, index):
        part = slice(5 * (index % 3), 5 * (index % 3) + 5)
        return self.x[part], self.y[part]


def dataset(x, y, *weights):
    return tensorflow().data.Dataset.from_tensor_slices((x, y, *weights)).batch(5)


def ragged(size):
    return tensorflow().ragged.constant([[1.0], [1.0, 2.0]] * (size // 2))


def in_batches(x, y):
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]


@pytest.mark.parametrize(
    "make",
    [
        dataset,
        lambda x, y: dataset(x, y, np.ones(12)),
        lambda x, y: dataset(x, y).repeat(),
        lambda x, y: Batches(x, y, 3),
        lambda x, y: Batches(x, y, None),
        lambda x, y: (batch for batch in in_batches(x, y)),
        in_batches,
        lambda x, y: [keras.tree.map_structure(array, b) for b in in_batches(x, y)],
    ],
    ids=["dataset", "weighted", "infinite", "PyDataset", "infinite PyDataset", "generator", "list",
         "tensors"],
)  # fmt: skip
def test_batches_give_what_arrays_give(float64, data, make):
    model = sequential(layers.Dense(NUM_CLASSES))
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    result = gamma_hat(model, make(*data), num_examples=12, num_trials=1)
    assert result.value == pytest.approx(expected, rel=1e-9)


def test_batches_of_dicts(float64, data):
    x, y = {"a": data[0], "b": data[0][::-1]}, data[1]
    model = compiled(of_dict_inputs())
    expected = ln_xi(rows_of_losses(model, x, log_loss_of(y)))
    result = gamma_hat(model, dataset(x, y), num_examples=12, num_trials=1)
    assert result.value == pytest.approx(expected, rel=1e-9)


def test_tensors(float64, data):
    model = sequential(layers.Dense(NUM_CLASSES))
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    assert measure(model, *map(array, data)).value == pytest.approx(expected, rel=1e-9)


def test_only_as_many_batches_are_read_as_examples_are_needed(data):
    read = []

    def batches():
        for i in itertools.count():
            read.append(i)
            yield data[0][4 * i : 4 * i + 4], data[1][4 * i : 4 * i + 4]

    gamma_hat(classifier(), batches(), num_examples=3, num_trials=3)
    assert read == [0, 1, 2]  # 9 examples of the 12


# ---------------------------------------------------------------- trials


def test_trials_share_no_example_until_all_have_been_used(float64, data):
    """Trials of one example tell which example it was."""
    model = classifier()
    each = np.log(np.sum(rows_of_losses(model, data[0], log_loss_of(data[1])) ** 2, axis=1))
    trials = gamma_hat(model, *data, num_examples=1, num_trials=24, seed=0).trials
    used = [int(np.argmin(np.abs(each - value))) for value in trials]
    np.testing.assert_allclose(trials, each[used], rtol=1e-9)
    assert sorted(used[:12]) == sorted(used[12:]) == list(range(12))
    assert used[:12] != used[12:]


def test_trials_of_several_examples_share_none(float64, data):
    x, y = data[0][:7], data[1][:7]
    model = classifier()
    rows = rows_of_losses(model, x, log_loss_of(y))
    pairs = {ln_xi(rows[list(pair)]): pair for pair in itertools.combinations(range(7), 2)}
    trials = gamma_hat(model, x, y, num_examples=2, num_trials=6, seed=0).trials
    used = [next(p for v, p in pairs.items() if v == pytest.approx(t, rel=1e-9)) for t in trials]
    for round_of_three in (used[:3], used[3:]):  # the seventh example waits
        assert len(set(itertools.chain(*round_of_three))) == 6


def test_draws(data):
    """A seed gives the same trials again; none gives new ones whatever the global seeds."""
    model = sequential(layers.Dense(NUM_CLASSES))

    def trials(seed):
        keras.utils.set_random_seed(0)
        return gamma_hat(model, *data, num_examples=4, num_trials=5, seed=seed).trials

    first = trials(1)
    np.testing.assert_array_equal(trials(np.int64(1)), first)
    for seed in (0, None):
        assert not np.allclose(trials(seed), first, rtol=1e-4)
    assert not np.allclose(trials(None), trials(None), rtol=1e-4)


def test_statistics_of_the_trials(data):
    result = gamma_hat(classifier(), *data, num_examples=3, num_trials=7, seed=0)
    assert result.trials.shape == (7,)
    assert result.value == pytest.approx(np.mean(result.trials), rel=1e-14)
    spread = math.sqrt(np.sum((result.trials - result.value) ** 2) / 6)
    assert result.stderr == pytest.approx(spread / math.sqrt(7), rel=1e-12)
    assert result.log_loss_part + result.geometry_part == pytest.approx(result.value, rel=1e-12)
    assert result.log_loss_part < 0


def test_one_trial_has_no_standard_error(data):
    assert math.isnan(measure(classifier(), *data).stderr)


def test_result_is_frozen(data):
    result = measure(classifier(), *data)
    assert isinstance(result, GammaHat)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0


def test_defaults_are_the_papers():
    defaults = gamma_hat.__kwdefaults__
    assert (defaults["num_examples"], defaults["num_trials"]) == (100, 100)
    assert defaults["softmax_scale"] == 0.04
    assert not defaults["normalize_softmax"] and not defaults["training"]


# ---------------------------------------------------------------- nothing is touched


class Unseeded(layers.Layer):
    """Draws from the global generator of `keras.random`."""

    def call(self, inputs, training=False):
        if not training:
            return inputs
        return inputs + 0.1 * keras.random.normal(keras.ops.shape(inputs), dtype=inputs.dtype)


def numbers_drawn():
    return [random.random(), np.random.random(), *numpy(keras.random.uniform((2,))),
            global_random_number()]  # fmt: skip


@pytest.mark.parametrize(("policy", "training"), [("float32", False), ("mixed_float16", True)])
def test_model_and_seeds_are_untouched(data, training, policy):
    keras.config.set_dtype_policy(policy)
    x, y = data[0].astype("float32"), data[1]
    stack = [layers.Dense(8, kernel_regularizer="l2"), layers.BatchNormalization()]
    stack += [layers.Dropout(0.3), layers.GaussianNoise(0.1)]
    if BACKEND != "jax":  # which refuses it
        stack.append(Unseeded())
    model = sequential(*stack, layers.Dense(NUM_CLASSES))
    model.compile("adam", from_logits(), metrics=["accuracy"])
    model.fit(x, y, verbose=0)

    def state():
        variables = model.variables + model.optimizer.variables + model.metrics_variables
        return [v.numpy() for v in variables], [x.dtype_policy.name for x in model.layers]

    before = state()
    arrays = x.copy(), y.copy()
    keras.utils.set_random_seed(1)
    numbers_drawn()  # makes the global generator, which takes its seed from Python's
    expected = numbers_drawn()
    keras.utils.set_random_seed(1)
    numbers_drawn()
    gamma_hat(model, x, y, num_examples=6, num_trials=2, training=training, chunk_size=3)
    drawn = numbers_drawn()
    np.testing.assert_equal(drawn, expected)
    np.testing.assert_equal(state(), before)
    np.testing.assert_equal((x, y), arrays)
    assert model.losses  # the penalties are back
    assert keras.config.dtype_policy().name == policy


@pytest.mark.slow
def test_next_training_step_is_the_same_after_measuring(data):
    x, y = data[0].astype("float32"), data[1]
    weights = []
    for measured in (False, True):
        keras.utils.set_random_seed(3)
        model = sequential(layers.Dense(8), layers.Dropout(0.5), layers.Dense(NUM_CLASSES))
        model.fit(x, y, batch_size=4, verbose=0)
        if measured:
            measure(model, x, y)
            measure(model, x, y, training=True)
        model.fit(x, y, batch_size=4, verbose=0)
        weights.append(model.get_weights())
    np.testing.assert_equal(*weights)


# ---------------------------------------------------------------- values that are not finite


def measure_and_catch(model, x, y, **kwargs):
    settings = {"num_examples": 4, "num_trials": 3, "seed": 0, **kwargs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = gamma_hat(model, x, y, **settings)
    assert len(caught) == 1, [str(w.message) for w in caught]
    return result, str(caught[0].message)


@pytest.mark.parametrize("training", [False, True])
def test_duplicate_examples(data, training):
    x, y = np.repeat(data[0][:4], 3, axis=0), np.repeat(data[1][:4], 3)
    result, message = measure_and_catch(classifier(), x, y, num_examples=6, training=training)
    assert result.value == result.geometry_part == -np.inf
    assert math.isnan(result.stderr)
    assert np.isfinite(result.log_loss_part)
    assert re.fullmatch(
        r"gamma_hat is not finite: \d of the 6 examples of the trial have a gradient parallel to "
        r"an earlier one's, such as examples \d and \d: they are duplicates, or look alike to the "
        r"model\. Take duplicates out of the data, or lower `num_examples`\. The data hold 8 "
        r"copies of other examples among their 12: keep the first of each, those of "
        r"`np\.unique\(x, axis=0, return_index=True\)\[1\]`\.",
        message,
    )


def test_the_advice_on_duplicates_makes_it_finite(data):
    x, y = np.repeat(data[0][:4], 3, axis=0), np.repeat(data[1][:4], 3)
    kept = np.unique(x, axis=0, return_index=True)[1]
    settings = {"num_examples": 4, "num_trials": 1}
    assert np.isfinite(gamma_hat(classifier(), x[kept], y[kept], **settings).value)


def test_examples_that_only_look_alike_are_no_copies(data):
    """The model cuts off what differs between them."""
    x, y = np.repeat(data[0][:1], 12, axis=0), np.zeros(12)
    x[:, 0] = np.arange(12)
    cut = layers.Reshape((6, 1)), layers.Cropping1D((1, 0)), layers.Flatten()
    model = sequential(*cut, layers.Dense(NUM_CLASSES))
    _, message = measure_and_catch(model, x, y)
    assert "look alike to the model" in message and "copies" not in message


@pytest.mark.parametrize("size", [1, 3])
def test_too_few_examples_are_told_how_many_to_ask_for(data, size):
    x, y = data[0][:size], data[1][:size]
    message = rf"Received: num_examples=4, {size} examples. Use `num_examples={size}`, or give more"
    with pytest.raises(ValueError, match=message):
        gamma_hat(classifier(), x, y, num_examples=4)


def test_a_loss_that_is_no_cross_entropy_is_no_gamma_hat_of_a_classifier(data):
    _, message = measure_and_catch(classifier(loss="mse"), data[0], np.eye(NUM_CLASSES)[data[1]])
    assert message == (
        "The loss is no cross-entropy, so that gamma_hat is ln|J J^T| of the gradients of the "
        "loss itself. It is no gamma-hat of a classifier, and does not compare with one. "
        "Received: loss='mse'"
    )


def test_warnings_point_at_the_users_line(data):
    x = np.repeat(data[0][:1], 2, axis=0)
    model = sequential(layers.Dense(4, "softmax"), layers.Rescaling(1.0),
                       loss="sparse_categorical_crossentropy")  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        gamma_hat(model, x, np.zeros(2), num_examples=2, num_trials=1)
    assert [w.filename for w in caught] == [__file__, __file__]


def test_one_singular_trial_among_others(data):
    x, y = data[0].copy(), data[1].copy()
    x[1], y[1] = x[0], y[0]
    settings = {"num_examples": 6, "num_trials": 2}
    model = classifier()
    for seed in itertools.count():  # until the two fall into one trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if np.any(np.isinf(gamma_hat(model, x, y, seed=seed, **settings).trials)):
                break
    result, _ = measure_and_catch(model, x, y, seed=seed, **settings)
    assert sorted(np.isinf(result.trials)) == [False, True]
    assert result.value == -np.inf
    assert math.isnan(result.stderr)


@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_fewer_weights_than_examples(data, policy, request):
    if policy == "float64":
        request.getfixturevalue("float64")
    model = sequential(layers.Dense(2, use_bias=False), inputs=(3,))
    result, message = measure_and_catch(model, data[0][:, :3], data[1] % 2, num_examples=7)
    assert result.value == -np.inf
    assert message == "gamma_hat is not finite: there are fewer weights (6) than examples (7)."


def test_examples_without_gradient(data):
    model = sequential(layers.Dense(NUM_CLASSES, use_bias=False))
    x = data[0].copy()
    x[:] = 0
    result, message = measure_and_catch(model, x, data[1])
    assert result.value == -np.inf
    assert message == "gamma_hat is not finite: examples 0, 1, 2, 3 have no gradient."


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("loss", "training"),
    [(None, False), (None, True), ("categorical_focal_crossentropy", False)],
)
def test_weights_that_are_not_finite(data, bad, loss, training):
    model = classifier(loss=loss)
    model.layers[0].kernel.assign(np.full((6, 8), bad))
    y = np.eye(NUM_CLASSES)[data[1]] if loss else data[1]
    result, message = measure_and_catch(model, data[0], y, training=training)
    assert math.isnan(result.value) and math.isnan(result.stderr)
    assert message.startswith("gamma_hat is not finite: gradients are not finite (examples ")


def test_overflowing_logits(data):
    """Weights of 1e38 are finite, their logits are not."""
    model = classifier()
    model.layers[1].kernel.assign(np.full((8, 4), 3e38))
    result, message = measure_and_catch(model, data[0], data[1])
    assert not math.isfinite(result.value)
    assert message.startswith("gamma_hat is not finite: ")


# ---------------------------------------------------------------- errors


def bare(*stack):
    return keras.Sequential([*stack, layers.Dense(NUM_CLASSES)])


def without_loss(model):
    model.compile("sgd")
    return model


def frozen():
    model = classifier()
    model.trainable = False
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model", TypeError, "`model` must be a `keras.Model`. Received: model='model'"),
        (lambda: keras.Model, TypeError, "`model` must be a `keras.Model`. Received: model=<class"),
        (lambda: bare(keras.Input((6,))), ValueError, "The model must be compiled with a loss."),
        (lambda: without_loss(bare(keras.Input((6,)))), ValueError,
         "must be compiled with a loss. Received: model=<Sequential"),
        (lambda: compiled(bare()), ValueError, "The model must be built"),
        (lambda: compiled(Subclassed()), ValueError, "The model must be built"),
        (frozen, ValueError, "have trainable weights. Received: model=<Sequential"),
        (lambda: sequential(layers.Dense(1)), ValueError,
         "a row of at least 2 class scores an example. Received: outputs of shape (1, 1)"),
        (lambda: sequential(layers.Reshape((3, 2))), ValueError, "trainable weights"),
    ],
    ids=["string", "class", "uncompiled", "no loss", "unbuilt", "unbuilt subclass", "frozen",
         "one score", "no weights"],
)  # fmt: skip
def test_bad_models(data, make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        measure(make(), *data)


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, np.nan])
def test_counts_out_of_range(data, value):
    for name in ("num_examples", "num_trials", "chunk_size"):
        text = f"`{name}` must be an integer of at least 1. Received: {name}={value!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            gamma_hat(classifier(), *data, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
        ({"seed": "a"}, "`seed` must be an integer of at least 0. Received: seed='a'"),
        ({"softmax_scale": 0}, "`softmax_scale` must be a finite number greater than 0. Received"),
        ({"softmax_scale": np.inf}, "`softmax_scale` must be a finite number greater than 0."),
        ({"softmax_scale": None}, "greater than 0. Received: softmax_scale=None"),
        ({"training": 1}, "`training` must be `True` or `False`. Received: training=1"),
        ({"normalize_softmax": "yes"}, "`normalize_softmax` must be `True` or `False`. Received"),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the "
                               "data. Received: num_examples=13, 12 examples"),
        ({}, "Received: num_examples=100, 12 examples"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gamma_hat(classifier(), *data, **arguments)


def test_arguments_are_keywords(data):
    with pytest.raises(TypeError, match="positional"):
        gamma_hat(classifier(), *data, 4)


@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy"])
def test_normalisation_needs_a_softmax(data, loss):
    text = "`normalize_softmax` needs a model compiled with one softmax cross-entropy. Received: "
    with pytest.raises(ValueError, match=text):
        measure(classifier(loss=loss), *data, normalize_softmax=True)


def test_training_mode_needs_a_cross_entropy(data):
    text = "`training` must be `False` unless the loss is a cross-entropy of one output. Received: "
    with pytest.raises(ValueError, match=text):
        measure(classifier(loss="mse"), data[0], np.eye(NUM_CLASSES)[data[1]], training=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite(data, bad):
    x = data[0].astype("float32")
    x[3, 2] = x[7, 0] = x[7, 1] = bad
    text = "`x` must be finite. Received: NaN or infinity in example 3 and 1 others"
    with pytest.raises(ValueError, match=text):
        measure(classifier(), x, data[1])
    with pytest.raises(ValueError, match=text):
        gamma_hat(classifier(), dataset(x, data[1]), num_examples=4, num_trials=3)


@pytest.mark.parametrize("shape", [(12,), (12, NUM_CLASSES)])
def test_labels_that_are_not_finite_are_refused(data, shape):
    y = np.zeros(shape)
    y[3] = np.nan
    text = "`y` must be finite. Received: NaN or infinity in example 3 and 0 others"
    with pytest.raises(ValueError, match=re.escape(text)):
        measure(classifier(), data[0], y)


@pytest.mark.parametrize(
    "labels",
    [
        lambda y: y - 0.5 * (y > 0),
        lambda y: np.eye(5)[y],
        lambda y: np.zeros((12, NUM_CLASSES)),
        lambda y: np.stack([y, y], axis=1),
        lambda y: np.array(list("abc") * 4),
    ],
    ids=["fractions", "width", "empty rows", "two", "strings"],
)
def test_labels_that_do_not_fit_the_classes(data, labels):
    y = labels(np.resize(np.arange(NUM_CLASSES), 12))
    text = re.escape(
        "`y` must hold integers from 0 to 3, or rows of 4 probabilities. Received: y of shape "
        f"{y.shape} and dtype {y.dtype}"
    )
    with pytest.raises(ValueError, match=text):
        measure(classifier(), data[0], y)


@pytest.mark.parametrize(
    "labels",
    [[-1, 1], [0, 2], [[0, 1], [1, 0]], ["a", "b"]],
    ids=["signs", "two", "one-hot", "strings"],
)
def test_labels_that_do_not_fit_binary_cross_entropy(data, labels):
    y = np.array(labels)
    text = re.escape(
        "`y` must hold one number from 0 to 1 an example. Received: y of shape "
        f"{y.shape} and dtype {y.dtype}"
    )
    model = sequential(layers.Dense(1), loss=binary_from_logits())
    with pytest.raises(ValueError, match=text):
        measure(model, data[0][:2], y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: (x, None), ValueError, "Labels are needed. Received: y=None."),
        (lambda x, y: ({"a": x}, None), ValueError, "Labels are needed. Received: y=None."),
        (lambda x, y: (dataset(x, y), y), ValueError,
         "`y` must be `None` where `x` gives batches `(x, y)`. Received: x=<_BatchDataset"),
        (lambda x, y: (Batches(x, y, 3), y), ValueError, "`y` must be `None` where `x` gives"),
        (lambda x, y: (tensorflow().data.Dataset.from_tensor_slices((x, y)), None), ValueError,
         "The data must come in batches. Received: an element"),
        (lambda x, y: (tensorflow().data.Dataset.from_tensor_slices(x).batch(5), None), ValueError,
         "Labels are needed. Received: batches of x alone."),
        (lambda x, y: (iter([]), None), ValueError, "The data must not be empty."),
        (lambda x, y: (x, y[:11]), ValueError,
         "must hold the same number of examples. Received: shapes [(12, 6), (11,)]"),
        (lambda x, y: (x, y[0]), ValueError, "must hold the same number of examples."),
        (lambda x, y: ({"a": x, "b": x[:3]}, y), ValueError, "the same number of examples."),
        (lambda x, y: (x.astype(object), y), TypeError, "must be dense arrays. Received: an array"),
        (lambda x, y: (ragged(2), y[:2]), TypeError,
         "must be an array, a structure of arrays, or an iterable of batches"),
        (lambda x, y: (dataset(ragged(12), y), None), TypeError,
         "must be dense arrays. Received: an array"),
        (lambda x, y: (3, y), TypeError, "`x` must be an array, a structure of arrays, or"),
        (lambda x, y: (None, y), TypeError, "Received: x=None (of type <class 'NoneType'>)"),
    ],
    ids=["no labels", "dict without labels", "dataset and y", "PyDataset and y", "unbatched",
         "batches of x", "empty", "lengths", "scalar label", "lengths in a dict", "objects",
         "ragged", "ragged batches", "number", "None"],
)  # fmt: skip
def test_bad_data(data, make, error, message):
    x, y = make(data[0].astype("float32"), data[1])
    with pytest.raises(error, match=re.escape(message)):
        gamma_hat(classifier(), x, y, num_examples=2, num_trials=2)
