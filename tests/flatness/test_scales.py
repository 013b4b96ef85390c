"""A loss times a factor has the factor's flatness: squares neither vanish nor overflow."""

import functools

import keras
import numpy as np
import pytest
from frameworks import BACKEND, only_on
from keras import layers
from parameters import with_slow

from keras_infomcr.flatness import (
    adaptive_sharpness,
    hessian_frobenius_norm,
    hessian_spectral_density,
    hessian_spectral_radius,
    hessian_top_eigenvalues,
    hessian_trace,
    local_entropy_gradient_norm,
)

MEASURES = {
    "radius": (hessian_spectral_radius, {}),
    "eigenvalues": (hessian_top_eigenvalues, {"num_eigenvalues": 3}),
    "hutchinson": (hessian_trace, {"method": "hutchinson"}),
    "hutch++": (hessian_trace, {}),
    "frobenius": (hessian_frobenius_norm, {}),
    "sharpness": (adaptive_sharpness, {}),
}
FACTORS = [1e-22, 1e22]  # whose squares are out of the range of float32


class Regression:
    """A linear regression whose loss is weighted."""

    def __init__(self, rng):
        self.x = rng.normal(size=(12, 3)).astype("float32")
        self.y = rng.normal(size=(12, 2)).astype("float32")
        self.model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])

    def measured(self, measure, factor, **settings):
        self.model.compile("sgd", "mse", loss_weights=[factor], run_eagerly=BACKEND != "jax")
        return measure(self.model, self.x, self.y, seed=0, **settings)


@pytest.fixture
def regression(rng):
    return Regression(rng)


SLOW = ("eigenvalues", "hutchinson", "hutch++")
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MEASURES]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", PARAMS)
def test_measures_scale_with_the_loss(regression, name, factor):
    measure, settings = MEASURES[name]
    results = [regression.measured(measure, f, **settings) for f in (1.0, factor)]
    # The same computations in float32, rounded otherwise.
    for field in ("value", "stderr", "samples"):
        plain, scaled = (np.asarray(getattr(result, field)) for result in results)
        np.testing.assert_allclose(scaled / factor, plain, rtol=1e-4, atol=1e-5)
    assert results[0].value > 0.1


@pytest.mark.parametrize("factor", with_slow(FACTORS, 1e22))
def test_gradient_of_the_local_entropy_scales_with_the_loss(regression, factor):
    """With gamma so large that the weights stay where they are."""
    values = [
        regression.measured(local_entropy_gradient_norm, f, gamma=g).value
        for f, g in ((1.0, 1e12), (factor, 1e12 * max(factor, 1.0)))
    ]
    assert values[1] / factor == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("factor", FACTORS)
def test_density_scales_with_the_loss(regression, factor):
    plain, scaled = (
        regression.measured(hessian_spectral_density, f, num_probes=2) for f in (1.0, factor)
    )
    assert scaled.width / factor == pytest.approx(plain.width, rel=1e-4)
    np.testing.assert_allclose(scaled.grid / factor, plain.grid, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scaled.value * factor, plain.value, rtol=1e-2, atol=1e-2)


@only_on("tensorflow", reason="float64 is computed by NumPy, of what any backend gives it")
def test_squares_of_float64_do_not_vanish_either(float64, rng):
    """The probability of the wrong class is e^-420, its square is not to be had."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(
        "sgd", keras.losses.BinaryCrossentropy(from_logits=True), run_eagerly=BACKEND != "jax"
    )
    model.set_weights([np.array([[420.0]])])
    args = model, np.ones((2, 1)), np.ones((2, 1))
    for measure in (hessian_frobenius_norm, hessian_spectral_radius):
        # The exponent of 420 is rounded to 6e-14.
        assert measure(*args, seed=0).value == pytest.approx(np.exp(-420.0), rel=1e-12, abs=0)


@pytest.mark.parametrize("factor", [1e-36, 0.0])
def test_curvature_too_small_for_the_dtype_is_reported(regression, factor):
    """float32 holds digits down to 1.2e-38."""
    text = "curvature is zero, or too small for float32, in which what is below 1e-38"
    for measure in (hessian_trace, functools.partial(hessian_spectral_density, num_steps=3)):
        with pytest.warns(UserWarning, match=text):
            regression.measured(measure, factor)


def test_curvature_that_overflows_is_no_number(regression):
    for measure in (hessian_spectral_radius, hessian_trace, hessian_frobenius_norm):
        value = regression.measured(measure, 2e38).value
        assert not np.isfinite(value)
