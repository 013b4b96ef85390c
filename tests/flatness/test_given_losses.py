"""Measures of a loss that is given, of models whose own training steps have another or none."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from nets import NUM_CLASSES, classifier, from_logits
from oracles import ln_xi, log_loss_of, rows_of_losses

from keras_infomcr import GammaHatCallback
from keras_infomcr.flatness import (
    fisher_frobenius_norm,
    fisher_spectral_radius,
    fisher_trace,
    gamma,
    gamma_hat,
    gamma_hat_by_layer,
    input_jacobian_norm,
)

pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
other_losses = pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")

ALL = {"num_examples": 12, "num_trials": 1, "seed": 0}
MEASURES = {
    gamma_hat: ALL,
    gamma: ALL,
    gamma_hat_by_layer: ALL,
    fisher_trace: ALL,
    fisher_spectral_radius: ALL,
    fisher_frobenius_norm: ALL,
    input_jacobian_norm: {},
}


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def numbers(result):
    return result.values if hasattr(result, "values") else result.value


def twin(model):
    """Return a model of the same layers that is not compiled."""
    return keras.Sequential([keras.Input((6,)), *model.layers])


class OwnStep(keras.Model):
    """Trains by a `train_step` of its own, and is compiled without a loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def call(self, inputs):
        return self.net(inputs)

    def train_step(self, *args):
        raise AssertionError("a measure takes no training step")


class OwnLoss(OwnStep):
    """Has a `compute_loss` with a teacher, as distillation has."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 1e3 * ops.mean(ops.square(y_pred))


def own_step(model):
    own = OwnStep(twin(model))
    own.compile("sgd")
    return own


def own_loss(model):
    own = OwnLoss(twin(model))
    own.compile("sgd", "mse")
    return own


def compiled_otherwise(model):
    other = twin(model)
    other.compile("sgd", "mse", loss_weights=[3.0])
    return other


# Each model, and both kinds of measures; CI tries all pairs.
FAST = [
    (twin, input_jacobian_norm),
    (own_step, gamma_hat),
    (own_loss, gamma_hat),
    (own_loss, fisher_trace),
    (compiled_otherwise, input_jacobian_norm),
]
CASES = [
    pytest.param(
        make,
        measure,
        id=f"{make.__name__}-{measure.__name__}",
        marks=[pytest.mark.slow] * ((make, measure) not in FAST),
    )
    for make in (twin, own_step, own_loss, compiled_otherwise)
    for measure in MEASURES
]


@pytest.mark.parametrize(("make", "measure"), CASES)
def test_a_given_loss_is_measured_as_if_it_were_compiled(float64, data, measure, make):
    model = classifier()
    expected = numbers(measure(model, *data, **MEASURES[measure]))
    other = make(model)
    other(data[0])
    found = numbers(measure(other, *data, loss=from_logits(), **MEASURES[measure]))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_loss_by_its_name_against_svd(float64, data):
    logits = classifier()
    model = keras.Sequential([keras.Input((6,)), *logits.layers, layers.Softmax()])
    expected = ln_xi(rows_of_losses(logits, data[0], log_loss_of(data[1])))
    found = gamma_hat(model, *data, loss="sparse_categorical_crossentropy", **ALL)
    assert found.value == pytest.approx(expected, rel=1e-9)


def cubes(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred) ** 3, axis=-1)


@other_losses
def test_a_function_against_svd(float64, data, rng):
    y = rng.normal(size=(12, NUM_CLASSES))
    model = own_step(classifier())
    model(data[0])
    rows = rows_of_losses(model, data[0], lambda outputs: cubes(ops.convert_to_tensor(y), outputs))
    found = gamma_hat(model, data[0], y, loss=cubes, **ALL)
    assert found.value == pytest.approx(ln_xi(rows), rel=1e-9)
    assert fisher_trace(model, data[0], y, loss=cubes, **ALL).value == pytest.approx(
        np.mean(np.sum(rows**2, axis=1)), rel=1e-9
    )


def test_a_model_with_a_step_of_its_own_is_told_of_the_argument(data):
    model = own_step(classifier())
    model(data[0])
    for measure, settings in MEASURES.items():
        with pytest.raises(ValueError, match=r"pass `loss=\.\.\.` to the measure"):
            measure(model, *data, **settings)


def test_labels_are_checked_against_the_given_loss(data):
    model = own_step(classifier())
    model(data[0])
    with pytest.raises(ValueError, match="`y` must hold integers from 0 to 3"):
        gamma_hat(model, data[0], data[1] + 1, loss=from_logits(), **ALL)


def test_callback_logs_a_given_loss(data):
    x, y = data[0].astype("float32"), data[1]
    model = classifier(loss="mse")
    callback = GammaHatCallback((x, y), num_examples=6, num_trials=2, loss=from_logits())
    model.fit(x, np.eye(NUM_CLASSES)[y], callbacks=[callback], verbose=0)
    expected = gamma_hat(model, x, y, num_examples=6, num_trials=2, seed=0, loss=from_logits())
    np.testing.assert_allclose(callback.result.trials, expected.trials, rtol=1e-5)
