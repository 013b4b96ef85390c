"""The Fisher information's norms against I formed of hand-written gradients in float64."""

import math

import keras
import numpy as np
import pytest
from measuring import assert_untouched, kinds_of_data, softmax
from nets import NUM_CLASSES, classifier, from_logits, sequential

from keras_infomcr.flatness import (
    fisher_frobenius_norm,
    fisher_spectral_radius,
    fisher_trace,
    gamma_hat,
)

# Small networks with random weights may be wrong about their few examples, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")

MEASURES = [
    (fisher_spectral_radius, lambda fisher: np.linalg.eigvalsh(fisher)[-1]),
    (fisher_frobenius_norm, lambda fisher: math.sqrt(np.sum(fisher**2))),
    (fisher_trace, np.trace),
]
layers = keras.layers
# Sums of some hundred terms that do not cancel, each rounded a few times.
ROUNDING = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def literal(statistic, rows):
    """Return a statistic of I = (1/N) sum_i grad l_i grad l_i^T."""
    return statistic(sum(np.outer(row, row) for row in rows) / len(rows))


def assert_norms(model, x, y, rows, rel, **settings):
    """Compare all measures with those of rows, compiled once; return their results."""
    settings = {"num_examples": len(rows), "num_trials": 1, **settings}
    results = [measure(model, x, y, **settings) for measure, _ in MEASURES]
    expected = [literal(statistic, rows) for _, statistic in MEASURES]
    assert [r.value for r in results] == pytest.approx(expected, rel=rel, abs=0)
    return results


def rows_of(x, slopes):
    """Return the gradients by kernel and bias, of those by the outputs."""
    return [np.concatenate([np.outer(a, d).ravel(), d]) for a, d in zip(x, slopes)]


def softmax_regression(x, y):
    model = sequential(layers.Dense(NUM_CLASSES, bias_initializer="normal"))
    kernel, bias = model.get_weights()
    slopes = softmax(x.astype("float64") @ kernel + bias) - np.eye(NUM_CLASSES)[y]
    return model, y, rows_of(x, slopes)


def softmax_outputs(x, y):
    loss = "categorical_crossentropy"
    model = sequential(layers.Dense(NUM_CLASSES, "softmax"), loss=loss)
    y = np.eye(NUM_CLASSES)[y]
    kernel, bias = model.get_weights()
    return model, y, rows_of(x, softmax(x.astype("float64") @ kernel + bias) - y)


def logistic_regression(x, y):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = sequential(layers.Dense(1, bias_initializer="normal"), loss=loss)
    kernel, bias = model.get_weights()
    slopes = 1 / (1 + np.exp(-(x.astype("float64") @ kernel + bias))) - (y % 2)[:, None]
    return model, y % 2, rows_of(x, slopes)


def sigmoid_outputs(x, y):
    logits, y, rows = logistic_regression(x, y)
    model = sequential(layers.Dense(1, "sigmoid"), loss="binary_crossentropy")
    model.set_weights(logits.get_weights())
    return model, y, rows


def linear_regression(x, y):
    model = sequential(layers.Dense(2, bias_initializer="normal"), loss="mse")
    y = np.stack([y, y**2], axis=1).astype("float32")
    kernel, bias = model.get_weights()
    return model, y, rows_of(x, x.astype("float64") @ kernel + bias - y)  # of mean((f - y)^2)


CASES = [
    softmax_regression, softmax_outputs, logistic_regression, sigmoid_outputs, linear_regression,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_norms_of_the_fisher_information_of_hand_written_gradients(float64, data, case):
    model, y, rows = case(*data)
    for result in assert_norms(model, data[0], y, rows, rel=1e-12):
        assert list(result.samples) == [result.value] and math.isnan(result.stderr)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_norms_in_float32(data, chunk_size):
    model, y, rows = softmax_regression(*data)
    assert_norms(model, data[0], y, rows, rel=1e-5, chunk_size=chunk_size)


def test_hidden_layer_against_finite_differences(float64, data):
    model = classifier()
    values = model.get_weights()
    sizes = np.cumsum([v.size for v in values])

    def losses(flat):
        parts = np.split(flat, sizes[:-1])
        kernel1, bias1, kernel2, bias2 = (p.reshape(v.shape) for p, v in zip(parts, values))
        probabilities = softmax(np.tanh(data[0] @ kernel1 + bias1) @ kernel2 + bias2)
        return -np.log(probabilities[np.arange(12), data[1]])

    flat = np.concatenate([v.ravel() for v in values])
    steps = 1e-5 * np.eye(sizes[-1])
    rows = np.array([(losses(flat + s) - losses(flat - s)) / 2e-5 for s in steps]).T
    # Losses of some 1 are rounded to 1e-16, differences of them divided by 2e-5.
    assert_norms(model, *data, rows, rel=1e-8)


def test_trials_are_averaged(data):
    model, y, rows = softmax_regression(*data)
    squares = np.sum(np.square(rows), axis=1)
    result = fisher_trace(model, data[0], y, num_examples=4, num_trials=3, seed=0)
    # Three trials of four use each of the 12 examples once.
    assert result.value == pytest.approx(np.mean(squares), rel=1e-5)
    assert result.stderr == pytest.approx(np.std(result.samples, ddof=1) / math.sqrt(3), rel=1e-12)
    for measure, _ in MEASURES:  # g g^T has one eigenvalue, its trace
        samples = measure(model, data[0], y, num_examples=1, num_trials=12, seed=0).samples
        np.testing.assert_allclose(sorted(samples), sorted(squares), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("margin", [60.0, 150.0])
def test_vanishing_losses_keep_finite_positive_norms(request, dtype, margin):
    """p - 1 of the true class is 0 in floating point, but not its gradient."""
    if dtype == "float64":
        request.getfixturevalue("float64")
    model = sequential(layers.Dense(3, use_bias=False), inputs=(3,), loss=from_logits())
    model.set_weights([margin * np.eye(3)])
    assert softmax(margin * np.eye(3))[0, 0] == 1
    small = math.exp(-margin)
    slopes = (np.ones((3, 3)) - 3 * np.eye(3)) * small / (1 + 2 * small)
    rows = [np.outer(a, d).ravel() for a, d in zip(np.eye(3), slopes)]
    results = assert_norms(model, np.eye(3), np.arange(3), rows, rel=ROUNDING[dtype])
    assert min(r.value for r in results) > 0


def test_information_too_small_for_float64_is_reported():
    """exp(-800) is; its logarithm is not."""
    model = sequential(layers.Dense(3, use_bias=False), inputs=(3,), loss=from_logits())
    model.set_weights([400 * np.eye(3)])
    data, settings = (np.eye(3), np.arange(3)), {"num_examples": 3, "num_trials": 1}
    for measure, _ in MEASURES:
        with pytest.warns(UserWarning, match="zero, or too small for float64.*give 0e"):
            assert measure(model, *data, **settings).value == 0
    assert gamma_hat(model, *data, **settings).value == pytest.approx(-2400, rel=0.01)


@kinds_of_data
def test_batches_give_what_arrays_give(data, make):
    model, y, rows = softmax_regression(*data)
    assert_norms(model, make(data[0], y), None, rows, rel=1e-5)


def test_model_and_seeds_are_untouched():
    def measure_all(*args):
        for measure, _ in MEASURES:
            measure(*args, num_examples=6, num_trials=2, chunk_size=3)

    assert_untouched(measure_all)


def test_weights_that_are_not_finite_give_nan(data):
    model = sequential(
        layers.Dense(NUM_CLASSES, kernel_initializer=keras.initializers.Constant(np.nan))
    )
    for measure, _ in MEASURES:
        assert math.isnan(measure(model, *data, num_examples=4, num_trials=2).value)


def test_sequences_of_classes_take_their_loss(float64, rng):
    """The gradient of the mean over six positions, by a kernel and a bias that they share."""
    x, y = rng.normal(size=(4, 6, 3)), rng.integers(0, NUM_CLASSES, (4, 6))
    model = sequential(layers.Dense(NUM_CLASSES, bias_initializer="normal"), inputs=(6, 3))
    kernel, bias = model.get_weights()
    rows = []
    for inputs, labels in zip(x, y):
        slopes = (softmax(inputs @ kernel + bias) - np.eye(NUM_CLASSES)[labels]) / 6
        rows.append(np.concatenate([(inputs.T @ slopes).ravel(), slopes.sum(axis=0)]))
    assert_norms(model, x, y, rows, rel=1e-12)


def categorical(label_smoothing=0.0):
    return keras.losses.CategoricalCrossentropy(True, label_smoothing)


def binary(label_smoothing=0.0):
    return keras.losses.BinaryCrossentropy(True, label_smoothing)


@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
@pytest.mark.parametrize(
    ("units", "shape", "loss", "smoothed"),
    [
        (3, (6,), categorical, lambda: categorical(0.3)),
        (1, (6,), binary, lambda: binary(0.3)),
        pytest.param(3, (5, 6), categorical, lambda: categorical(0.3), marks=pytest.mark.slow),
        pytest.param(3, (6,), binary, lambda: binary(0.3), marks=pytest.mark.slow),
        (3, (6,), lambda: "mse", lambda: "mse"),
    ],
    ids=["classes", "two classes", "sequences", "several labels", "squares"],
)
def test_loss_is_that_of_the_example_alone(float64, rng, units, shape, loss, smoothed):
    """No smoothing, weight or penalty has a part in any loss of one output."""
    x = rng.normal(size=(6, *shape))
    y = np.eye(units)[rng.integers(0, units, x.shape[:-1])]
    plain = sequential(layers.Dense(units), inputs=shape, loss=loss())
    penalties = {"kernel_regularizer": "l2", "activity_regularizer": "l1"}
    dense = layers.Dense(units, **penalties)
    trained = sequential(dense, Adding(), inputs=shape)
    trained.compile("sgd", smoothed(), loss_weights=[3.0])
    trained.set_weights(plain.get_weights())
    for measure in (fisher_trace, gamma_hat):
        expected, found = (
            measure(model, x, y, num_examples=6, num_trials=1, seed=0) for model in (plain, trained)
        )
        assert found.value == pytest.approx(expected.value, rel=1e-9)


class Adding(layers.Layer):
    """Adds a loss of what it is given."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(inputs**2))
        return inputs


def test_weights_of_several_outputs_are_kept(float64, rng):
    """Nothing else makes one loss of them; a common factor of 2 is 4 times the trace."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(3)(inputs)])
    x, y = rng.normal(size=(6, 6)), [rng.normal(size=(6, n)) for n in (2, 3)]
    traces = []
    for weights in ([1.0, 0.0], [0.0, 1.0], [2.0, 2.0]):
        model.compile("sgd", ["mse", "mse"], loss_weights=weights)
        traces.append(fisher_trace(model, x, y, num_examples=6, num_trials=1).value)
    assert traces[2] == pytest.approx(4 * (traces[0] + traces[1]), rel=1e-9)


@pytest.mark.parametrize("value", [0, 2.0, "auto"])
@pytest.mark.parametrize("measure", [m for m, _ in MEASURES])
def test_bad_numbers_of_trials(data, measure, value):
    with pytest.raises(ValueError, match="`num_trials` must be an integer of at least 1"):
        measure(classifier(), *data, num_examples=4, num_trials=value)


def test_bad_arguments(data):
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`\. Received: model=3"):
        fisher_trace(3, *data)
    with pytest.raises(ValueError, match="`num_examples` must not exceed the number of examples"):
        fisher_trace(classifier(), *data, num_examples=13)


def test_warning_points_at_the_users_line(data):
    model = sequential(
        layers.Dense(NUM_CLASSES, "softmax"), layers.Rescaling(1.0),
        loss="sparse_categorical_crossentropy",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="does not end in a softmax or sigmoid") as caught:
        fisher_trace(model, *data, num_examples=4, num_trials=1)
    assert [w.filename for w in caught if "softmax" in str(w.message)] == [__file__]
