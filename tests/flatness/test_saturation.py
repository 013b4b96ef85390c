"""Losses whose probabilities are rounded to 0 and 1, against closed forms in float64.

The second derivatives of the cross-entropy by the logits, diag p - p p^T, are those of p (1 - p).
"""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import layers, losses
from measuring import softmax

from keras_infomcr.flatness import (
    adaptive_sharpness,
    gamma_hat,
    hessian_frobenius_norm,
    hessian_spectral_radius,
    hessian_trace,
    local_energy,
)
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.labels import is_sparse

# A saturated model that is wrong about an example does not fit it, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")

CLASSES = 3
# Logits of 40 in float32 are wrong by 2e-6, and their exponentials by as much of themselves.
ROUNDING = 1e-5


def model_of(*stack, loss, inputs=(CLASSES,)):
    """Return a compiled model; eager where that is fast for one layer."""
    model = keras.Sequential([keras.Input(inputs), *stack])
    model.compile("sgd", loss, run_eagerly=BACKEND != "jax")
    return model


def softmax_layer(loss):
    return model_of(layers.Dense(CLASSES, "softmax", use_bias=False), loss=loss())


def layer_of_its_own(loss):
    return model_of(layers.Dense(CLASSES, use_bias=False), layers.Softmax(), loss=loss())


def activation_layer(loss):
    dense = layers.Dense(CLASSES, use_bias=False)
    return model_of(dense, layers.Activation("softmax"), loss=loss())


def logits(loss):
    return model_of(layers.Dense(CLASSES, use_bias=False), loss=loss(from_logits=True))


SPARSE, DENSE = losses.SparseCategoricalCrossentropy, losses.CategoricalCrossentropy
BINARY = losses.BinaryCrossentropy
CASES = {
    "softmax": (softmax_layer, SPARSE),
    "one-hot": (softmax_layer, DENSE),
    "name": (softmax_layer, lambda: "sparse_categorical_crossentropy"),
    "function": (softmax_layer, lambda: losses.categorical_crossentropy),
    "Softmax": (layer_of_its_own, SPARSE),
    "Activation": (activation_layer, DENSE),
    "logits": (logits, SPARSE),
    "one-hot logits": (logits, DENSE),
}


class Saturated:
    """Softmax regression on unit vectors, each of which has a logit that is far above all others.

    Args:
        make: Function of a loss that returns the model.
        loss: Function that returns the loss.
        right: Boolean, whether that logit is the one of the label.
        margin: Float, how far.
    """

    def __init__(self, make, loss, right, margin=40.0):
        self.model = make(loss)
        kernel = margin * np.eye(CLASSES) + [[0, 0, margin / 4], [0, 0, 0], [0, 0, 0]]
        self.model.set_weights([kernel])
        self.x = np.eye(CLASSES, dtype="float32")
        labels = (np.arange(CLASSES) + (not right)) % CLASSES
        self.one_hot = np.eye(CLASSES)[labels]
        sparse = is_sparse(self.model.loss)
        self.y = labels if sparse else self.one_hot.astype("float32")
        p = softmax(kernel)  # of each unit vector
        curvatures = -p[:, :, None] * p[:, None]
        np.einsum("nkk->nk", curvatures)[...] = 0  # not p - p^2, where p is 1
        np.einsum("nkk->nk", curvatures)[...] = -curvatures.sum(axis=2)
        self.eigenvalues = np.linalg.eigvalsh(curvatures / CLASSES)
        slopes = np.where(self.one_hot == 1, -(p * (1 - self.one_hot)).sum(1, keepdims=True), p)
        self.gradient = slopes.ravel() / CLASSES

    @property
    def data(self):
        return self.model, self.x, self.y


FAST = ("one-hot", "logits")
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", PARAMS)
def test_hessian_of_saturated_softmax_regression(name, right):
    saturated = Saturated(*CASES[name], right)
    found = hessian_spectral_radius(*saturated.data, seed=0, tolerance=1e-4)
    largest = saturated.eigenvalues.max()
    assert found.value == pytest.approx(largest, rel=ROUNDING, abs=0)
    assert abs(found.smallest) < ROUNDING * largest  # the loss is convex
    trace = hessian_trace(*saturated.data, seed=0)  # exactly: there are fewer weights than vectors
    assert trace.value == pytest.approx(saturated.eigenvalues.sum(), rel=ROUNDING, abs=0)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["softmax", "one-hot", "logits"])
def test_gradient_of_saturated_softmax_regression(name, right):
    saturated = Saturated(*CASES[name], right)
    loss = LossFunction(saturated.model)
    _, gradient = loss.gradient([(saturated.x, saturated.y)], loss.point())
    scale = np.abs(saturated.gradient).max()
    np.testing.assert_allclose(gradient, saturated.gradient, rtol=ROUNDING, atol=1e-6 * scale)


@pytest.mark.parametrize("labels", [(1, 0), (0, 1), (1, 1)], ids=["right", "wrong", "both"])
@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_saturated_logistic_regression(activation, labels):
    """The logits are 40 and -40; p (1 - p) is the same for both."""
    loss = BINARY(from_logits=activation is None)
    model = model_of(layers.Dense(1, activation, use_bias=False), loss=loss, inputs=(1,))
    model.set_weights([np.array([[40.0]])])
    data = np.array([[1.0], [-1.0]], "float32"), np.array(labels)
    found = hessian_spectral_radius(model, *data, seed=0)
    assert found.value == pytest.approx(np.exp(-40.0), rel=ROUNDING, abs=0)
    function = LossFunction(model)
    _, (slope,) = function.gradient([data], function.point())
    # Each example that is wrong has a slope of 1, away from 0; the right ones next to none.
    wrong = (labels[0] == 0) + (labels[1] == 1)
    expected = (wrong - (2 - wrong) * np.exp(-40.0)) / 2
    assert slope == pytest.approx(expected, rel=ROUNDING, abs=0)


def test_worst_case_of_an_example_that_is_wrong_by_far():
    """The loss -ln p of Keras is flat beyond p = 1e-7; its own rises by the margin."""
    loss = BINARY()
    model = model_of(layers.Dense(1, "sigmoid", use_bias=False), loss=loss, inputs=(1,))
    model.set_weights([np.array([[40.0]])])
    data = np.ones((1, 1), "float32"), np.zeros(1)
    assert adaptive_sharpness(model, *data, rho=0.5).value == pytest.approx(20, rel=ROUNDING)
    found = local_energy(model, *data, sigma=0.1, seed=0, num_samples=40)
    assert abs(found.value) < 4 * found.stderr and found.stderr > 0.1


# ---------------------------------------------------------------- not saturated


def sequences(loss):
    embedding = layers.Embedding(5, 4, mask_zero=True)
    return model_of(embedding, layers.Dense(CLASSES, "softmax"), loss=loss, inputs=(6,))


def two_outputs(**settings):
    inputs = keras.Input((4,))
    outputs = {
        "a": layers.Dense(CLASSES, "softmax", activity_regularizer="l2")(inputs),
        "b": layers.Dense(2, "sigmoid")(inputs),
    }
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": SPARSE(), "b": "binary_crossentropy"}, **settings)
    return model


def flat(*stack, **settings):
    return model_of(*stack, inputs=(4,), **settings)


def dense(units, activation=None):
    return layers.Dense(units, activation, bias_initializer="normal")


USUAL = {
    "smoothing": ((3, "softmax"), lambda: DENSE(label_smoothing=0.2), "soft"),
    "ignore_class": ((3, "softmax"), lambda: SPARSE(ignore_class=1), "labels"),
    "ignored logits": ((3,), lambda: SPARSE(ignore_class=1, from_logits=True), "labels"),
    "labels in a column": ((3, "softmax"), SPARSE, "column"),
    "labels without a column": ((1, "sigmoid"), lambda: "binary_crossentropy", "signs"),
    "several labels": ((3, "sigmoid"), lambda: BINARY(label_smoothing=0.2), "soft"),
    "binary logits": ((3,), lambda: BINARY(from_logits=True, label_smoothing=0.2), "soft"),
    "sigmoid of classes": ((3, "sigmoid"), DENSE, "soft"),
    "softmax of labels": ((3, "softmax"), BINARY, "soft"),
    "probabilities as logits": ((3, "softmax"), lambda: DENSE(from_logits=True), "soft"),
    "squares": ((3, "softmax"), lambda: "mse", "soft"),
}


def labels_of(kind, rng, count):
    classes = rng.integers(0, CLASSES, count)
    return {
        "labels": classes,
        "column": classes[:, None],
        "signs": classes % 2,
        "soft": rng.dirichlet(np.ones(CLASSES), count).astype("float32"),
    }[kind]


def assert_compiled_loss(model, x, y):
    """Assert that the measured loss is the loss that Keras evaluates."""
    expected = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    loss = LossFunction(model)
    # A sum of a few terms of the order of one, in another order.
    assert loss.loss([(x, y)], loss.point()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.filterwarnings("ignore:.*does not represent logits")  # on TensorFlow
def test_loss_is_the_compiled_one_where_nothing_is_saturated(rng, name):
    layer, loss, kind = USUAL[name]
    x = rng.normal(size=(12, 4)).astype("float32")
    assert_compiled_loss(flat(dense(*layer), loss=loss()), x, labels_of(kind, rng, 12))


def test_masked_sequences_keep_their_mask(rng):
    x, y = rng.integers(0, 5, (7, 6)), rng.integers(0, CLASSES, (7, 6))
    assert_compiled_loss(sequences(SPARSE()), x, y)


def test_weights_of_losses_and_activity_penalties_are_kept(rng):
    model = two_outputs(loss_weights={"a": 0.3, "b": 2.0})
    x = rng.normal(size=(12, 4)).astype("float32")
    assert_compiled_loss(model, x, {"a": np.arange(12) % 3, "b": x[:, :2] > 0})


def test_loss_of_a_users_own_compute_loss(rng):
    class Doubled(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    inputs = keras.Input((4,))
    model = Doubled(inputs, layers.Dense(CLASSES, "softmax")(inputs))
    model.compile("sgd", SPARSE())
    assert_compiled_loss(model, rng.normal(size=(12, 4)).astype("float32"), np.arange(12) % 3)


# ---------------------------------------------------------------- what cannot be looked behind


def test_probabilities_that_are_clipped_are_reported_once():
    model = model_of(
        layers.Dense(CLASSES, "softmax", use_bias=False), layers.Rescaling(1.0), loss=SPARSE()
    )
    x, y = np.eye(CLASSES, dtype="float32"), np.arange(CLASSES)
    model.set_weights([5 * np.eye(CLASSES)])
    hessian_trace(model, x, y, seed=0)  # nothing to report
    model.set_weights([40 * np.eye(CLASSES)])
    text = "probabilities are nearer to 0 or 1 than 1e-07.*`from_logits=True`"
    with pytest.warns(UserWarning) as caught:
        local_energy(model, x, y, sigma=0.0, num_samples=1)
    assert [w.filename for w in caught if re.search(text, str(w.message))] == [__file__]


def test_logits_of_a_sigmoid_are_none_of_a_softmax(float64, rng):
    """Keras scales the probabilities of the classes to the sum 1: softmax of ln p."""
    x, y = rng.normal(size=(12, 4)), np.arange(12) % CLASSES
    of_sigmoids = flat(dense(CLASSES, "sigmoid"), loss=SPARSE())
    of_logarithms = flat(dense(CLASSES, "log_sigmoid"), loss=SPARSE(from_logits=True))
    of_logarithms.set_weights(of_sigmoids.get_weights())
    settings = {"num_examples": 6, "num_trials": 1, "seed": 0}
    with pytest.warns(UserWarning, match="does not end in a softmax or sigmoid"):
        found = gamma_hat(of_sigmoids, x, y, **settings)
    assert found.value == pytest.approx(gamma_hat(of_logarithms, x, y, **settings).value, rel=1e-9)


class Corrected(keras.losses.CategoricalCrossentropy):
    """Multiplies the probabilities by a matrix first, as for noisy labels; not registered."""

    def call(self, y_true, y_pred):
        return super().call(y_true, corrected(y_pred))


class Renamed(keras.losses.CategoricalCrossentropy):
    """Keras's loss under another name, not registered."""


def corrected(probabilities):
    return keras.ops.matmul(probabilities, keras.ops.convert_to_tensor(NOISE))


def corrected_cross_entropy(y_true, y_pred):
    return keras.losses.categorical_crossentropy(y_true, corrected(y_pred))


NOISE = (np.eye(3) * 0.7 + 0.1).astype("float32")


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        (Corrected, lambda: corrected_cross_entropy),
        pytest.param(Renamed, keras.losses.CategoricalCrossentropy, marks=pytest.mark.slow),
    ],
    ids=["corrected", "renamed"],
)
@pytest.mark.parametrize(
    "measure", [pytest.param(hessian_frobenius_norm, marks=pytest.mark.slow), hessian_trace]
)
@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
def test_losses_derived_from_those_of_keras(rng, loss, same, measure):
    """A loss that computes the same as another has the same derivatives, to float32."""
    x, y = rng.normal(size=(20, 4)).astype("float32"), np.eye(3)[rng.integers(3, size=20)]
    found = []
    for make in (loss, same):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])
        model.compile("sgd", make())
        found.append(measure(model, x, y, num_examples=20, num_trials=1, seed=0).value)
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("activation", [pytest.param("softmax", marks=pytest.mark.slow), None])
def test_several_outputs_of_a_model_that_was_never_trained(rng, activation):
    """On JAX what Keras makes at its first loss must not be made while it is traced."""
    inputs = keras.Input((4,))
    outputs = [layers.Dense(3, activation)(inputs) for _ in range(2)]
    model = keras.Model(inputs, outputs)
    loss = losses.CategoricalCrossentropy(from_logits=activation is None)
    model.compile("sgd", [loss, loss])
    x, y = rng.normal(size=(20, 4)).astype("float32"), np.eye(3)[rng.integers(3, size=20)]
    first = hessian_frobenius_norm(model, x, [y, y], seed=0).value
    model.evaluate(x, [y, y], verbose=0)
    assert first == pytest.approx(hessian_frobenius_norm(model, x, [y, y], seed=0).value, rel=1e-5)
