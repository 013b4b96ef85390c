"""The bound against extended precision, and against the basin of a quadratic loss."""

import dataclasses
import math
import re

import mpmath
import numpy as np
import pytest

from keras_infomcr.flatness import pac_bayes_bound

SETTINGS = {
    "train_loss": 0.3,
    "gamma": -50.0,
    "num_weights": 20,
    "num_examples": 1000,
    "log_volume": 3.0,
}


def literal(train_loss, gamma, num_weights, num_examples, log_volume, delta=0.05):
    """Return A and the bound, with powers of the volume itself: Theorem 1 and the basin's rim."""
    with mpmath.workdps(60):
        volume, w = mpmath.exp(log_volume), mpmath.mpf(num_weights)
        a = w * volume ** (2 / w) * mpmath.pi ** (1 / w) * mpmath.exp(mpmath.mpf(gamma) / w)
        a /= 4 * mpmath.pi * mpmath.e
        root = 2 * train_loss + 2 * a + mpmath.log(mpmath.mpf(2 * num_examples) / delta)
        # The volume of an ellipsoid, solved for its height.
        h = (volume * mpmath.gamma(w / 2 + 1)) ** (2 / w) * mpmath.exp(mpmath.mpf(gamma) / w)
        h /= 2 * mpmath.pi
        return a, train_loss + h + 2 * mpmath.sqrt(root / (num_examples - 1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_loss": 0, "gamma": 7.5},
        {"num_weights": 1, "num_examples": 2, "log_volume": -1.0, "gamma": 1.0},
        {"delta": 1},
        {"delta": 1e-9, "gamma": np.float64(30.0)},
    ],
)
def test_theorem_in_extended_precision(changes):
    settings = {**SETTINGS, **changes}
    complexity, value = literal(**settings)
    result = pac_bayes_bound(**settings)
    # Numbers of some 1 to 10, rounded ten times.
    assert math.exp(result.log_complexity) == pytest.approx(float(complexity), rel=1e-13)
    assert result.value == pytest.approx(float(value), rel=1e-13)


@pytest.mark.parametrize("per_weight", [(-8.0, 3.0), (-2.5, -6.0), (9.0, -4.0)])
def test_ten_million_weights(per_weight):
    """V and |I| are far beyond floating point."""
    num_weights = 10_000_000
    gamma, log_volume = (share * num_weights for share in per_weight)
    assert abs(log_volume) > math.log(np.finfo("float64").max)
    settings = {**SETTINGS, "num_weights": num_weights, "gamma": gamma, "log_volume": log_volume}
    complexity, value = literal(**settings)
    result = pac_bayes_bound(**settings)
    # The logarithm, of some 20, is rounded to 1e-14.
    assert result.log_complexity == pytest.approx(float(mpmath.log(complexity)), abs=1e-13)
    assert result.value == pytest.approx(float(value), rel=1e-12)


def bound_of_basin(rng, num_weights, height):
    """Return the bound of M = {d^T H d / 2 <= h}, an ellipsoid with half-axes sqrt(2 h / l_i)."""
    eigenvalues = np.exp(rng.normal(-3, 2, num_weights))
    half_axes = np.sqrt(2 * height / eigenvalues)
    unit_ball = num_weights / 2 * math.log(math.pi) - math.lgamma(num_weights / 2 + 1)
    return pac_bayes_bound(
        train_loss=0.1,
        gamma=np.sum(np.log(eigenvalues)),
        num_weights=num_weights,
        num_examples=1000,
        log_volume=unit_ball + np.sum(np.log(half_axes)),
    )


@pytest.mark.parametrize(("num_weights", "ratio"), [(10, 0.79), (100, 0.955), (1000, 0.993)])
@pytest.mark.parametrize("height", [0.1, 3.0])
def test_complexity_is_the_height_of_a_quadratic_basin(rng, num_weights, ratio, height):
    """A / h tends to 1 as Stirling's formula for Gamma(W / 2 + 1) does: near W^(-1 / W)."""
    result = bound_of_basin(rng, num_weights, height)
    measured = math.exp(result.log_complexity) / height
    assert measured == pytest.approx(ratio, abs=0.005 if num_weights == 10 else 0.0005)
    # Stirling's formula is too small by 1 / (12 n), n = W / 2, of which A takes the power 2 / W.
    correction = 1 / (3 * num_weights**2)
    assert measured == pytest.approx(num_weights ** (-1 / num_weights), rel=1.1 * correction)


@pytest.mark.parametrize("num_weights", [2, 10, 1000])
@pytest.mark.parametrize("height", [0.1, 3.0])
def test_the_bound_is_above_the_theorem_with_the_mean_loss_of_its_draws(rng, num_weights, height):
    """Q ~ exp(-rise) in the ellipsoid, where rise = h r^2 and r has the density W r^(W - 1)."""
    result = bound_of_basin(rng, num_weights, height)
    rises = height * rng.uniform(size=20_000) ** (2 / num_weights)
    chances = np.exp(-rises)
    mean_rise = np.sum(rises * chances) / np.sum(chances)
    root = 2 * 0.1 + 2 * math.exp(result.log_complexity) + math.log(2 * 1000 / 0.05)
    theorem = 0.1 + mean_rise + 2 * math.sqrt(root / 999)
    assert theorem < result.value
    # The draws lie at the rim, the more so the more weights there are: 1 - r^2 is some 2 / W.
    assert result.value - theorem < height * (2 + height) * 2 / num_weights


@pytest.mark.parametrize("name", ["gamma", "log_volume"])
def test_a_singular_information_or_no_volume_leaves_no_complexity(name):
    result = pac_bayes_bound(**{**SETTINGS, name: -math.inf})
    assert result.log_complexity == -math.inf
    expected = 0.3 + 2 * math.sqrt((2 * 0.3 + math.log(2 * 1000 / 0.05)) / 999)
    assert result.value == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gamma", [-math.inf, -60.0, 0.0, 60.0]),
        ("log_volume", [-30.0, 0.0, 30.0]),
        ("train_loss", [0.0, 0.1, 1.0]),
        ("delta", [1.0, 0.1, 1e-6]),
        ("num_examples", [10**6, 1000, 10]),
    ],
)
def test_the_bound_rises_with(name, values):
    """A smaller gamma, a flatter minimum, promises more."""
    bounds = [pac_bayes_bound(**{**SETTINGS, name: value}).value for value in values]
    assert bounds == sorted(bounds) and len(set(bounds)) == len(bounds)


def test_a_bound_beyond_floating_point_is_infinity():
    result = pac_bayes_bound(**{**SETTINGS, "gamma": 20 * 1000.0})
    assert result.value == math.inf
    assert result.log_complexity == pytest.approx(
        float(mpmath.log(literal(**{**SETTINGS, "gamma": 20 * 1000.0})[0])), rel=1e-14
    )
    large = pac_bayes_bound(**{**SETTINGS, "gamma": 20 * 700.0})
    assert large.value < math.inf


def test_delta_is_five_percent_by_default_and_the_result_is_frozen():
    result = pac_bayes_bound(*SETTINGS.values())
    assert result == pac_bayes_bound(**SETTINGS, delta=0.05)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("train_loss", -0.1, "a finite number, 0 or greater"),
        ("train_loss", math.inf, "a finite number, 0 or greater"),
        ("gamma", math.nan, "a number or -inf"),
        ("gamma", math.inf, "a number or -inf"),
        ("gamma", "1", "a number or -inf"),
        ("log_volume", math.nan, "a number or -inf"),
        ("log_volume", math.inf, "a number or -inf"),
        ("num_weights", 0, "an integer of at least 1"),
        ("num_weights", 20.0, "an integer of at least 1"),
        ("num_examples", 1, "an integer of at least 2"),
        ("delta", 0.0, "a number in (0, 1]"),
        ("delta", 1.1, "a number in (0, 1]"),
    ],
)
def test_bad_arguments(name, value, what):
    text = re.escape(f"`{name}` must be {what}. Received: {name}={value!r}")
    with pytest.raises(ValueError, match=text):
        pac_bayes_bound(**{**SETTINGS, name: value})
