"""Norms against math.hypot, which scales too."""

import math

import numpy as np
import pytest

from keras_infomcr.core.euclidean_norm import euclidean_norm, unit_of


@pytest.mark.parametrize("shape", [(30,), (5, 6)])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", s) for s in (1e-36, 1e-22, 1.0, 1e22, 1e37)]
    + [("float64", s) for s in (1e-300, 1e-170, 1.0, 1e170, 1e300)],
)
def test_norm_of_numbers_of_any_size(rng, dtype, size, shape):
    array = (size * rng.uniform(-1, 1, shape)).astype(dtype)
    # Thirty squares that do not cancel, each rounded once or twice.
    rounding = 30 * float(np.finfo(dtype).eps)
    expected = math.hypot(*array.astype("float64").ravel())
    assert euclidean_norm(array) == pytest.approx(expected, rel=rounding)
    assert unit_of(array) == np.abs(array).max()


def test_norm_of_zeros_is_zero():
    assert euclidean_norm(np.zeros(3)) == 0
    assert unit_of(np.zeros(3)) == 1


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_norm_of_what_is_not_finite(number):
    array = np.array([1e30, number], "float32")
    np.testing.assert_equal(euclidean_norm(array), abs(number))
    assert unit_of(array) == 1
