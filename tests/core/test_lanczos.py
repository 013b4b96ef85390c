"""Eigenvalues against matrices of known spectra."""

import numpy as np
import pytest

from keras_infomcr.core.lanczos import top_eigenvalues, tridiagonal

OUTLIERS = [-30.0, 50.0, 41.0, 20.0, 10.0, 9.0]


def by_size(values):
    return np.argsort(-np.abs(values))


def matrix_of(rng, spectrum, dtype="float64"):
    basis, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return ((basis * spectrum) @ basis.T).astype(dtype)


@pytest.fixture
def spectrum(rng):
    return np.concatenate([OUTLIERS, rng.uniform(-1, 1, 294)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 4, 6, 12])
def test_largest_by_size(rng, spectrum, count, dtype):
    """Also beyond the gap, where convergence is slow and the basis is restarted."""
    matrix = matrix_of(rng, spectrum, dtype)
    start = rng.normal(size=300).astype(dtype)
    found, error, _ = top_eigenvalues(lambda v: matrix @ v, start, count, by_size, 1e-3, 300, 1.0)
    assert found.shape == (count,)
    assert error <= 1e-3
    expected = spectrum[by_size(spectrum)][:count]
    # Each found value is within 1e-3 of 50 of an eigenvalue; twice that where two may be mixed up.
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=0.1)
    isolated = min(count, len(OUTLIERS))
    # An error bound r means an error of r^2 / gap: 0.05^2 / 8 for the least of the outliers.
    np.testing.assert_allclose(found[:isolated], expected[:isolated], atol=4e-4)


@pytest.mark.parametrize("power", [-100, 100])
def test_matrices_whose_squares_float32_cannot_hold(rng, spectrum, power):
    """Times a power of two, what is computed is the same but for the exponents."""
    matrix, start = matrix_of(rng, spectrum, "float32"), rng.normal(size=300).astype("float32")
    factor = np.float32(2.0**power)

    def eigenvalues(factor):
        found = top_eigenvalues(lambda v: factor * (matrix @ v), start, 4, by_size, 1e-3, 99, 1.0)
        return found[0], found[1], tridiagonal(lambda v: factor * (matrix @ v), start, 10)

    values, error, reduced = eigenvalues(np.float32(1))
    scaled_values, scaled_error, scaled_reduced = eigenvalues(factor)
    np.testing.assert_allclose(scaled_values, 2.0**power * values, rtol=1e-6)
    assert scaled_error == pytest.approx(error, rel=1e-3)
    np.testing.assert_allclose(scaled_reduced, 2.0**power * reduced, rtol=1e-4)


@pytest.mark.parametrize("floor", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("start_of", range(3))
def test_tolerance_is_of_the_size_of_each_above_the_floor(rng, spectrum, floor, start_of):
    matrix, start = matrix_of(rng, spectrum), np.random.default_rng(start_of).normal(size=300)
    found, _, _ = top_eigenvalues(lambda v: matrix @ v, start, 10, by_size, 0.01, 300, floor)
    nearest = [spectrum[np.argmin(np.abs(spectrum - value))] for value in found]
    errors = np.abs(found - nearest) / np.maximum(np.abs(found), 50 * floor)
    assert errors.max() <= 0.01
    if floor == 0.01:  # no outlier is left out; of 9 the error is r^2 / gap, 0.09^2 / 1
        np.testing.assert_allclose(found[:6], spectrum[by_size(spectrum)][:6], rtol=1e-3)


def test_both_ends(rng, spectrum):
    matrix = matrix_of(rng, spectrum)
    found, _, _ = top_eigenvalues(
        lambda v: matrix @ v,
        rng.normal(size=300),
        2,
        lambda values: np.array([len(values) - 1, *range(len(values) - 1)]),
        1e-6,
        300,
        1.0,
    )
    np.testing.assert_allclose(found, [50, -30], rtol=1e-6)


def test_number_of_products_is_kept_to(rng, spectrum):
    matrix, calls = matrix_of(rng, spectrum), []

    def product(vector):
        calls.append(vector)
        return matrix @ vector

    start = rng.normal(size=300)
    _, error, _ = top_eigenvalues(product, start, 12, by_size, 1e-9, 17, 1.0)
    assert len(calls) == 17
    assert error > 1e-9
    assert all(np.linalg.norm(v) == pytest.approx(1) for v in calls)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_repeated_eigenvalues_of_an_invariant_subspace(count):
    found, _, _ = top_eigenvalues(lambda v: 2 * v, np.ones(3), count, by_size, 1e-9, 50, 1.0)
    np.testing.assert_allclose(found, 2.0, rtol=1e-14)


def test_zero_matrix():
    found, error, _ = top_eigenvalues(np.zeros_like, np.ones(5), 2, by_size, 1e-9, 50, 1.0)
    np.testing.assert_array_equal(found, [0, 0])
    assert error == 0


def test_one_weight():
    found, _, _ = top_eigenvalues(lambda v: -3 * v, np.ones(1), 1, by_size, 1e-9, 50, 1.0)
    np.testing.assert_allclose(found, [-3])


def test_products_that_are_not_finite():
    found, error, _ = top_eigenvalues(lambda v: v * np.nan, np.ones(3), 2, by_size, 1e-9, 50, 1.0)
    assert np.isnan(found).all()
    assert np.isnan(error)
    assert np.isnan(tridiagonal(lambda v: v * np.nan, np.ones(3), 2)).all()


def test_tridiagonal_of_all_steps_has_the_spectrum(rng):
    spectrum = np.arange(1.0, 9.0)
    matrix = matrix_of(rng, spectrum)
    reduced = tridiagonal(lambda v: matrix @ v, rng.normal(size=8), 20)
    assert reduced.shape == (8, 8)
    # Seven steps of rounding, each amplified by the loss of orthogonality of so short a run.
    np.testing.assert_allclose(np.linalg.eigvalsh(reduced), spectrum, rtol=1e-9)


def test_tridiagonal_gives_the_moments_of_the_start(rng, spectrum):
    """Gauss's quadrature with m nodes is exact for polynomials of degree 2 m - 1."""
    matrix, start = matrix_of(rng, spectrum), rng.normal(size=300)
    nodes, vectors = np.linalg.eigh(tridiagonal(lambda v: matrix @ v, start, 4))
    power = start / np.linalg.norm(start)
    unit = power
    for degree in range(8):
        assert vectors[0] ** 2 @ nodes**degree == pytest.approx(unit @ power, rel=1e-10)
        power = matrix @ power


def test_tridiagonal_ends_with_an_invariant_subspace():
    matrix = np.diag([1.0, 2, 3, 4])
    reduced = tridiagonal(lambda v: matrix @ v, np.array([1.0, 0, 1, 0]), 4)
    assert reduced.shape == (2, 2)
    np.testing.assert_allclose(np.linalg.eigvalsh(reduced), [1, 3], rtol=1e-14)
