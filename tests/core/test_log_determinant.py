"""ln|G| against closed forms and known spectra, and the cause of each singular G."""

import math

import numpy as np
import pytest

from keras_infomcr.core.log_determinant import log_determinant

EPSILON64 = np.finfo("float64").eps
EPSILON32 = np.finfo("float32").eps


def orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def gram_of(rows):
    rows = rows.astype("float64")
    return rows @ rows.T


def test_one_example_gives_the_log_of_its_squared_norm():
    assert log_determinant(np.array([[9.0]]), EPSILON64, 5) == (pytest.approx(math.log(9)), "")


def test_diagonal_gram():
    value, cause = log_determinant(np.diag([1.0, 4.0, 0.25, 10.0]), EPSILON64, 4)
    # Scaled to unit rows C is the identity: only the logarithms round, 4 eps each.
    assert value == pytest.approx(math.log(10), rel=1e-14)
    assert cause == ""


def test_two_examples_with_a_known_angle():
    # |G| = ||a||^2 ||b||^2 sin^2 = 4 * 9 * 3/4.
    gram = np.array([[4.0, 3.0], [3.0, 9.0]])
    assert log_determinant(gram, EPSILON64, 2)[0] == pytest.approx(math.log(27), rel=1e-14)


@pytest.mark.parametrize("size", [2, 10, 100])
def test_equal_correlations(size):
    # C = (1 - r) I + r 11^T has |C| = (1 - r)^(N-1) (1 + (N - 1) r).
    r = 0.9
    gram = 3 * ((1 - r) * np.eye(size) + r)
    expected = size * math.log(3) + (size - 1) * math.log(1 - r) + math.log1p((size - 1) * r)
    # Eigenvalues err by about eps ||C|| = eps N r each, the smallest being 1 - r = 0.1.
    tolerance = size * EPSILON64 * size * r / (1 - r)
    assert log_determinant(gram, EPSILON64, size)[0] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_known_spectrum(rng, decades):
    size = 30
    singular_values = np.logspace(0, decades, size)
    rows = orthogonal(rng, size) * singular_values @ orthogonal(rng, size)
    value, cause = log_determinant(gram_of(rows), EPSILON64, size)
    # The Gram matrix squares the condition number; each of N eigenvalues errs by N eps of ||G||.
    tolerance = size * size * EPSILON64 * 10.0 ** (2 * decades) + 1e-13 * size
    assert value == pytest.approx(2 * np.sum(np.log(singular_values)), abs=tolerance)
    assert cause == ""


def test_rows_of_very_different_size_are_not_singular(rng):
    """Rows are scaled to norm 1 first: 30 decades between them cost nothing."""
    size = 20
    angles = orthogonal(rng, size) + 0.1
    scales = np.logspace(-15, 15, size)
    expected = 2 * np.linalg.slogdet(angles)[1] + 2 * np.sum(np.log(scales))
    value, cause = log_determinant(gram_of(scales[:, None] * angles), EPSILON64, size)
    # `angles` has condition number below 10: its Gram errs by 100 N eps in each of N eigenvalues.
    assert value == pytest.approx(expected, abs=100 * size**2 * EPSILON64)
    assert cause == ""


def test_scaling_the_rows_shifts_the_logarithm(rng):
    gram = gram_of(rng.normal(size=(6, 40)))
    scales = np.array([1e-6, 1.0, 3.0, 1e5, 0.5, 7.0])
    value, _ = log_determinant(gram, EPSILON64, 40)
    scaled, _ = log_determinant(gram * np.outer(scales, scales), EPSILON64, 40)
    assert scaled - value == pytest.approx(2 * np.sum(np.log(scales)), rel=1e-13)


def test_order_of_examples_does_not_matter(rng):
    gram = gram_of(rng.normal(size=(8, 20)))
    order = rng.permutation(8)
    value, _ = log_determinant(gram, EPSILON64, 20)
    assert log_determinant(gram[order][:, order], EPSILON64, 20)[0] == pytest.approx(value)


@pytest.mark.parametrize("epsilon", [EPSILON32, EPSILON64])
@pytest.mark.parametrize("size", [2, 10, 100])
def test_fewer_weights_than_examples(rng, size, epsilon):
    gram = gram_of(rng.normal(size=(size, size - 1)))
    value, cause = log_determinant(gram, epsilon, size - 1)
    assert value == -np.inf
    assert cause == f"there are fewer weights ({size - 1}) than examples ({size})"


@pytest.mark.parametrize("factor", [1, -1, 1e-3, 1e6])
@pytest.mark.parametrize("size", [3, 100])
def test_parallel_rows(rng, size, factor):
    rows = rng.normal(size=(size, 500))
    rows[2] = factor * rows[1]
    value, cause = log_determinant(gram_of(rows), EPSILON64, 500)
    assert value == -np.inf
    assert cause == (
        f"1 of the {size} examples of the trial have a gradient parallel to an earlier one's, "
        "such as examples 1 and 2: they are duplicates, or look alike to the model. Take "
        "duplicates out of the data, or lower `num_examples`"
    )


def test_each_example_that_repeats_an_earlier_one_counts_once(rng):
    rows = rng.normal(size=(9, 500))
    rows[[3, 4, 8]] = rows[0], -2 * rows[0], rows[5]
    _, cause = log_determinant(gram_of(rows), EPSILON64, 500)
    assert cause.startswith("3 of the 9 examples of the trial have a gradient parallel")
    assert "such as examples 0 and 3:" in cause


@pytest.mark.parametrize("size", [3, 30, 100])
def test_dependent_rows_of_which_no_two_are_parallel(rng, size):
    rows = rng.normal(size=(size, 500))
    rows[-1] = rows[:-1].sum(axis=0)
    value, cause = log_determinant(gram_of(rows), EPSILON64, 500)
    assert value == -np.inf
    assert cause == "the gradients of the examples are linearly dependent"


def test_rows_equal_up_to_float32_rounding_are_singular(rng):
    """Two float32 rows that differ by their rounding alone carry no volume."""
    rows = rng.normal(size=(3, 500))
    rows[1] = rows[0]
    rows[:2] *= 1 + rng.uniform(-0.5, 0.5, size=(2, 500)) * EPSILON32
    assert log_determinant(gram_of(rows), EPSILON32, 500)[0] == -np.inf


def test_rows_further_apart_than_float32_rounding_are_not_singular(rng):
    rows = rng.normal(size=(3, 500))
    rows[1] = rows[0] + 1e-4 * rng.normal(size=500)
    value, cause = log_determinant(gram_of(rows), EPSILON32, 500)
    assert cause == ""
    # The smallest eigenvalue of C is about 1e-8 / 2; float64 rounds it by 3 eps.
    assert value == pytest.approx(np.linalg.slogdet(gram_of(rows))[1], abs=1e-6)


@pytest.mark.parametrize(
    ("zero", "listed"), [([1], "1"), ([0, 3], "0, 3"), (range(7), "0, 1, 2, 3, 4, ...")]
)
def test_examples_without_gradient(rng, zero, listed):
    rows = rng.normal(size=(8, 20))
    rows[list(zero)] = 0
    value, cause = log_determinant(gram_of(rows), EPSILON64, 20)
    assert (value, cause) == (-np.inf, f"examples {listed} have no gradient")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite(rng, bad):
    gram = gram_of(rng.normal(size=(4, 20)))
    gram[2, :] = gram[:, 2] = bad
    value, cause = log_determinant(gram, EPSILON64, 20)
    assert math.isnan(value)
    assert cause == "gradients are not finite (examples 2 of the trial)"


def test_input_is_left_as_it_is(rng):
    gram = gram_of(rng.normal(size=(4, 20)))
    before = gram.copy()
    log_determinant(gram, EPSILON64, 20)
    np.testing.assert_array_equal(gram, before)
