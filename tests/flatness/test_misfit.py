"""A measure of a model that does not fit its data says so."""

import math
import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from parameters import slow_but

from keras_infomcr import GammaHatCallback, callbacks, flatness
from keras_infomcr.flatness.data.examples import draw_trials

NUM_CLASSES = 4
GUESS = math.log(NUM_CLASSES)
TRIAL = {"num_examples": 5, "num_trials": 2, "seed": 0}
MEASURES = {
    "gamma_hat": TRIAL,
    "gamma": TRIAL,
    "gamma_hat_by_layer": TRIAL,
    "fisher_trace": TRIAL,
    "fisher_frobenius_norm": TRIAL,
    "fisher_spectral_radius": TRIAL,
    "hessian_trace": {"num_products": 6},
    "hessian_frobenius_norm": {"num_products": 6},
    "hessian_spectral_radius": {},
    "hessian_top_eigenvalues": {"num_eigenvalues": 1},
    "hessian_spectral_density": {"num_probes": 1, "num_steps": 3},
}


@pytest.fixture
def data(rng):
    """Ten examples, which the trials of five share out among them."""
    return rng.normal(size=(10, 12)).astype("float32"), rng.integers(0, NUM_CLASSES, 10)


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def regression(loss=None, units=NUM_CLASSES, activation=None):
    model = keras.Sequential([keras.Input((12,)), layers.Dense(units, activation)])
    model.compile(keras.optimizers.SGD(0.0), loss or cross_entropy())
    return model


def scaled(model, factor):
    model.layers[-1].kernel.assign(np.float32(factor) * model.layers[-1].kernel)
    return model


def mean_loss(model, x, y):
    """Return the softmax cross-entropy in float64, with no framework."""
    kernel, bias = (np.asarray(w, "float64") for w in model.get_weights())
    logits = x.astype("float64") @ kernel + bias
    return float(np.mean(np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]))


def misfits(function, *args, **kwargs):
    """Return the losses and the guesses that a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    texts = [str(w.message) for w in caught if "does not fit" in str(w.message)]
    pattern = r"mean loss, (\S+), is more than twice the loss of a uniform guess, (\S+)\. "
    return [tuple(map(float, re.search(pattern, text).groups())) for text in texts]


# They find the loss in the same place as other measures: CI alone tries them.
SLOW = ("fisher_frobenius_norm", "fisher_spectral_radius", "hessian_frobenius_norm",
        "hessian_top_eigenvalues", "gamma_hat_by_layer")  # fmt: skip
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MEASURES]


@pytest.mark.parametrize("name", PARAMS)
def test_a_diverged_model_is_warned_of_with_its_loss(data, name):
    model = scaled(regression(), 1e6)
    [(loss, guess)] = misfits(getattr(flatness, name), model, *data, **MEASURES[name])
    # Three digits are printed.
    assert loss == pytest.approx(mean_loss(model, *data), rel=6e-3)
    assert guess == pytest.approx(GUESS, rel=6e-3)


@pytest.mark.parametrize(
    "name",
    ["gamma_hat", pytest.param("fisher_trace", marks=pytest.mark.slow), "hessian_trace"],
)
@pytest.mark.parametrize(("times", "count"), [(1.99, 0), (2.01, 1)])
def test_the_limit_is_twice_the_loss_of_a_uniform_guess(data, name, times, count):
    """With a kernel of zeros and labels 0: the loss is ln(1 + 3 exp(b)) if the first bias is -b."""
    model = scaled(regression(), 0.0)
    bias = math.log((math.exp(times * GUESS) - 1) / (NUM_CLASSES - 1))
    model.layers[0].bias.assign([-bias, 0, 0, 0])
    y = np.zeros(10, "int32")
    assert mean_loss(model, data[0], y) == pytest.approx(times * GUESS, rel=1e-6)
    assert len(misfits(getattr(flatness, name), model, data[0], y, **MEASURES[name])) == count


@pytest.mark.parametrize("name", ["gamma_hat", "hessian_trace"])
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_of_two_classes(data, name, activation):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = regression(loss if activation is None else "binary_crossentropy", 1, activation)
    kernel = np.asarray(model.layers[0].kernel, "float64")
    model.layers[0].kernel.assign(2 * kernel)
    logits = data[0].astype("float64") @ (2 * kernel)[:, 0]
    assert np.abs(logits).max() < 12  # or Keras cuts the probabilities off
    y = (logits < 0).astype("int32")  # wrong throughout
    [(loss, guess)] = misfits(getattr(flatness, name), model, data[0], y, **MEASURES[name])
    # Three digits are printed.
    assert loss == pytest.approx(np.mean(np.logaddexp(0, np.abs(logits))), rel=6e-3)
    assert guess == pytest.approx(math.log(2), rel=6e-3)


@pytest.mark.parametrize("name", ["gamma_hat", "fisher_trace", "hessian_trace"])
def test_other_losses_have_no_guess_to_compare_with(data, name):
    model = scaled(regression(loss="mse"), 1e3)
    y = np.eye(NUM_CLASSES)[data[1]]
    assert misfits(getattr(flatness, name), model, data[0], y, **MEASURES[name]) == []


class Ruin(keras.callbacks.Callback):
    """Sets the scale of the kernel, epoch by epoch."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def on_train_begin(self, logs=None):
        self.kernel = np.asarray(self.model.layers[-1].kernel)

    def on_epoch_end(self, epoch, logs=None):
        self.model.layers[-1].kernel.assign(self.kernel * np.float32(self.factors[epoch]))


@pytest.mark.parametrize(
    "make",
    [
        lambda data: GammaHatCallback(data, **TRIAL),
        pytest.param(
            lambda data: callbacks.FlatnessCallback(data, [flatness.hessian_trace]),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gamma_hat", "hessian_trace"],
)
def test_in_fit_once_until_the_model_fits_again(data, make):
    factors = [1.0, 1e6, 1e6, 1.0, 1e6, 1e6]
    steps = [Ruin(factors), make(data)]
    found = misfits(regression().fit, *data, epochs=len(factors), callbacks=steps, verbose=0)
    assert len(found) == 2


@pytest.mark.parametrize("name", slow_but(["gamma_hat", "fisher_trace"], "gamma_hat"))
@pytest.mark.parametrize(("factor", "count"), [(1.0, 0), (1e6, 1)])
def test_normalised_logits_are_judged_as_they_were(data, name, factor, count):
    """Divided by their norm, logits of any size give much the same loss."""
    model = scaled(regression(), factor)
    measure = getattr(flatness, name)
    found = misfits(measure, model, *data, normalize_softmax=True, **{**TRIAL, "num_trials": 1})
    assert len(found) == count
    if count:
        [measured] = draw_trials(10, 5, 1, seed=0)
        # Three digits are printed.
        assert found[0][0] == pytest.approx(
            mean_loss(model, *(a[measured] for a in data)), rel=6e-3
        )


def test_the_plain_gamma_hat_takes_a_diverged_model_for_flat(data):
    """What the warning is for: the examples that large logits get right outweigh all others.

    A kernel that fits all ten examples, by least squares, and one that misplaces three of them.
    """
    x, y = data
    signs = 2 * np.eye(NUM_CLASSES)[y] - 1
    fits, diverged = regression(), regression()
    fits.layers[0].kernel.assign(5 * np.linalg.lstsq(x, signs, rcond=None)[0])
    signs[:3] = np.roll(signs[:3], 1, axis=1)
    diverged.layers[0].kernel.assign(1e6 * np.linalg.lstsq(x, signs, rcond=None)[0])
    assert mean_loss(fits, x, y) < 0.01 < 1e5 < mean_loss(diverged, x, y)
    flat = flatness.gamma_hat(fits, x, y, **TRIAL).value
    with pytest.warns(UserWarning, match="The model does not fit the measured examples"):
        assert flatness.gamma_hat(diverged, x, y, **TRIAL).value < 100 * flat < 0
