"""The input Jacobian against closed forms of regressions and finite differences."""

import math
import re

import keras
import numpy as np
import pytest
from measuring import assert_untouched, kinds_of_data, softmax
from nets import NUM_CLASSES, classifier, compiled, from_logits, sequential
from parameters import with_slow

from keras_infomcr.flatness import input_jacobian_norm

layers = keras.layers
NORMS = {"spectral": 2, "frobenius": None}  # as `np.linalg.norm` calls them


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def squares(jacobians, norm):
    """Return the squared norm of each of a list of matrices."""
    return [np.linalg.norm(j, NORMS[norm]) ** 2 for j in jacobians]


def of_softmax(logits, kernel):
    """Return (diag p - p p^T) W^T of each example."""
    return [(np.diag(p) - np.outer(p, p)) @ kernel.T for p in softmax(logits)]


def assert_norms(model, x, jacobians, rel, **settings):
    """Compare both norms, compiled once."""
    for norm in NORMS:
        result = input_jacobian_norm(model, x, norm=norm, **settings)
        expected = squares(jacobians, norm)
        np.testing.assert_allclose(result.samples, expected, rtol=rel)
        assert result.value == pytest.approx(np.mean(expected), rel=rel)
        stderr = np.std(expected, ddof=1) / math.sqrt(len(expected))
        assert result.stderr == pytest.approx(stderr, rel=100 * rel)


# In float64 sums of some ten terms, of which p - p^2 cancels little: 1e-12.
@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        (None, from_logits),
        ("softmax", lambda: "sparse_categorical_crossentropy"),
        (None, lambda: keras.losses.CategoricalCrossentropy(from_logits=True)),
    ],
    ids=["logits", "softmax", "categorical"],
)
def test_softmax_regression_has_a_closed_form(float64, data, activation, loss):
    model = sequential(layers.Dense(NUM_CLASSES, activation), loss=loss())
    kernel, bias = model.get_weights()
    assert_norms(model, data[0], of_softmax(data[0] @ kernel + bias, kernel), rel=1e-12)


@pytest.mark.parametrize("from_logits", [True, False])
def test_logistic_regression_has_a_closed_form(float64, data, from_logits):
    loss = keras.losses.BinaryCrossentropy(from_logits=from_logits)
    model = sequential(layers.Dense(1, None if from_logits else "sigmoid"), loss=loss)
    kernel, bias = model.get_weights()
    p = 1 / (1 + np.exp(-(data[0] @ kernel + bias)))
    assert_norms(model, data[0], [q * (1 - q) * kernel.T for q in p], rel=1e-12)


def test_jacobian_of_a_model_without_classes_is_that_of_its_output(float64, data):
    model = sequential(layers.Dense(3), loss="mse")
    jacobians = [model.get_weights()[0].T] * 12
    for norm in NORMS:
        samples = input_jacobian_norm(model, data[0], norm=norm).samples
        np.testing.assert_allclose(samples, squares(jacobians, norm), rtol=1e-12)


def test_float32(data):
    model = sequential(layers.Dense(NUM_CLASSES))
    kernel, bias = model.get_weights()
    x = data[0].astype("float32")
    # A relative rounding of 1e-7, some ten times, and twice that in the square.
    assert_norms(model, x, of_softmax(x.astype("float64") @ kernel + bias, kernel), rel=1e-5)


def test_several_inputs_share_one_jacobian(float64, data):
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((2, 3), name="b")}
    stack = layers.Dense(NUM_CLASSES), layers.Dense(NUM_CLASSES)
    logits = stack[0](inputs["a"]) + stack[1](layers.Flatten()(inputs["b"]))
    model = compiled(keras.Model(inputs, logits))
    x = {"a": data[0], "b": data[0][::-1].reshape(12, 2, 3) + 1}
    (kernel1, bias1), (kernel2, bias2) = (layer.get_weights() for layer in stack)
    logits = x["a"] @ kernel1 + bias1 + x["b"].reshape(12, 6) @ kernel2 + bias2
    assert_norms(model, x, of_softmax(logits, np.concatenate([kernel1, kernel2])), rel=1e-12)


def test_two_outputs_are_taken_as_one_row(float64, data):
    inputs = keras.Input((6,))
    outputs = [layers.Dense(2)(inputs), layers.Reshape((3, 1))(layers.Dense(3)(inputs))]
    model = compiled(keras.Model(inputs, outputs), ["mse", "mse"])
    kernel = np.concatenate([w for w in model.get_weights() if w.ndim == 2], axis=1)
    batches = [(data[0], (np.zeros((12, 2)), np.zeros((12, 3, 1))))]
    result = input_jacobian_norm(model, batches)
    assert result.value == pytest.approx(np.linalg.norm(kernel, 2) ** 2, rel=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 5, 128])
def test_examples_do_not_see_each_other(float64, data, chunk_size):
    """Against finite differences by an example's own inputs; batch norm is in inference mode."""
    stack = [layers.Dense(5), layers.BatchNormalization(), layers.Activation("tanh")]
    stack += [layers.Dropout(0.5), layers.Dense(NUM_CLASSES)]
    model = sequential(*stack)
    kernel1, bias1, *_, kernel2, bias2 = model.get_weights()
    scale, shift, mean, variance = moments = [np.linspace(k, k + 1, 5) for k in range(4)]
    model.layers[1].set_weights(moments)

    def probabilities(x):
        normal = (x @ kernel1 + bias1 - mean) / np.sqrt(variance + 1e-3)
        return softmax(np.tanh(scale * normal + shift) @ kernel2 + bias2)

    steps = 1e-5 * np.eye(6)
    columns = [(probabilities(data[0] + s) - probabilities(data[0] - s)) / 2e-5 for s in steps]
    # Probabilities are rounded to 1e-16, differences of them divided by 2e-5.
    assert_norms(model, data[0], np.stack(columns, axis=2), rel=1e-7, chunk_size=chunk_size)


@pytest.mark.parametrize("margin", with_slow([2.0, 12.0, 15.0, 40.0, 200.0], 12.0, 200.0))
@pytest.mark.parametrize("kind", ["logits", "softmax", "sigmoid"])
def test_saturated_probabilities_keep_their_slope(margin, kind):
    """The logits are m and 0, or m alone: the slopes are p q, p = 1 / (1 + exp(-m))."""
    classes = 1 if kind == "sigmoid" else 2
    loss = {"logits": from_logits(), "softmax": "sparse_categorical_crossentropy"}
    loss = loss.get(kind, "binary_crossentropy")
    activation = None if kind == "logits" else kind
    model = sequential(layers.Dense(classes, activation, use_bias=False), inputs=(2,), loss=loss)
    model.set_weights([margin * np.eye(2)[:, :classes]])
    result = input_jacobian_norm(model, np.array([[1.0, 0.0]], "float32"))
    slope = math.exp(-margin) / (1 + math.exp(-margin)) ** 2
    # p q [[1, -1], [-1, 1]] = diag p - p p^T has the norm 2 p q. Float32 rounds to 1e-7.
    assert result.value == pytest.approx((classes * margin * slope) ** 2, rel=1e-5)


def test_weights_that_are_not_finite_give_nan(data):
    model = sequential(layers.Dense(NUM_CLASSES))
    model.layers[0].bias.assign(np.full(NUM_CLASSES, np.nan))
    for norm in NORMS:
        assert math.isnan(input_jacobian_norm(model, data[0].astype("float32"), norm=norm).value)


# ---------------------------------------------------------------- data


def test_labels_are_not_needed_nor_used(data):
    model, x = sequential(layers.Dense(NUM_CLASSES)), data[0].astype("float32")
    expected = input_jacobian_norm(model, x).samples
    for arguments in ((x, data[1]), (x, np.full(12, 99)), (keras.ops.convert_to_tensor(x),)):
        np.testing.assert_array_equal(input_jacobian_norm(model, *arguments).samples, expected)


@kinds_of_data
def test_batches_give_what_arrays_give(data, make):
    model, x = sequential(layers.Dense(NUM_CLASSES)), data[0].astype("float32")
    kernel, bias = model.get_weights()
    jacobians = of_softmax(x.astype("float64") @ kernel + bias, kernel)
    assert_norms(model, make(x, data[1]), jacobians, rel=1e-5)


def test_examples_are_drawn_without_replacement(float64, data):
    model = sequential(layers.Dense(NUM_CLASSES))
    every = input_jacobian_norm(model, data[0]).samples
    few, again, others = (
        input_jacobian_norm(model, data[0], num_examples=7, chunk_size=7, seed=seed).samples
        for seed in (0, 0, 1)
    )
    used = [int(np.argmin(np.abs(every - value))) for value in few]
    np.testing.assert_allclose(few, every[used], rtol=1e-12)
    assert len(set(used)) == 7
    np.testing.assert_array_equal(few, again)
    assert not np.allclose(few, others)


def test_model_and_seeds_are_untouched():
    assert_untouched(lambda *args: input_jacobian_norm(*args, num_examples=8, chunk_size=5))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_integers_are_refused(data, dtype):
    message = "The inputs must be floating-point numbers, to be differentiated by. Received: x of "
    with pytest.raises(TypeError, match=re.escape(f"{message}dtype {dtype}. Cast images, or")):
        input_jacobian_norm(classifier(), np.ones((3, 6), dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "nuclear"}, "`norm` must be one of 'spectral', 'frobenius'. Received: norm="),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        ({"num_examples": 0}, "`num_examples` must be an integer of at least 1."),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the data"),
        ({"seed": -1}, "`seed` must be an integer of at least 0."),
        ({"verbose": 2}, "`verbose` must be one of 0, 1. Received: verbose=2"),
        ({"x": np.full((3, 6), np.nan)}, "`x` must be finite."),
        ({"x": np.zeros((0, 6))}, "The data must not be empty."),
        ({"x": []}, "The data must not be empty. Received: no batch"),
        ({"x": [np.zeros((3, 6))]}, "Labels are needed. Received: batches of x alone."),
    ],
)  # fmt: skip
def test_bad_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        input_jacobian_norm(**{"model": classifier(), "x": data[0], **arguments})


def test_bad_model(data):
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`\. Received: model='m'"):
        input_jacobian_norm("m", data[0])
    with pytest.raises(ValueError, match="The model must be compiled with a loss"):
        input_jacobian_norm(keras.Sequential([keras.Input((6,)), layers.Dense(2)]), data[0])
