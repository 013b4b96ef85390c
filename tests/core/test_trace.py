"""Traces and Frobenius norms against matrices that are known."""

import itertools

import numpy as np
import pytest

from keras_infomcr.core.trace import hutch_plus_plus, hutchinson, squared_norms


def symmetric(rng, size):
    matrix = rng.normal(size=(size, size))
    return matrix + matrix.T


def signs(rng, size, count):
    return rng.choice([-1.0, 1.0], (count, size))


def test_hutchinson_over_all_probes_is_the_trace(rng):
    """The mean over all 2^W vectors of signs is E[z^T A z]."""
    matrix = symmetric(rng, 5)
    probes = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    estimates = hutchinson(lambda v: v @ matrix, np.split(probes, [20]))
    assert estimates.shape == (32,)
    assert estimates.mean() == pytest.approx(np.trace(matrix), rel=1e-13)


def test_hutch_plus_plus_over_all_probes_is_the_trace(rng):
    matrix = symmetric(rng, 5)
    probes = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    estimates = hutch_plus_plus(lambda v: v @ matrix, [signs(rng, 5, 2)], [probes])
    assert estimates.mean() == pytest.approx(np.trace(matrix), rel=1e-13)


def test_hutch_plus_plus_is_exact_where_the_rank_is_that_of_the_sketch(rng):
    rows = rng.normal(size=(3, 40))
    matrix = rows.T @ rows
    sketches, probes = np.split(signs(rng, 40, 3), 3), [signs(rng, 40, 4)]
    estimates = hutch_plus_plus(lambda v: v @ matrix, sketches, probes)
    np.testing.assert_allclose(estimates, np.trace(matrix), rtol=1e-12)


def test_hutch_plus_plus_errs_less_where_few_eigenvalues_are_large(rng):
    """The products are as many; the outliers make nearly all of Hutchinson's variance."""
    basis, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    matrix = (basis * np.concatenate([[100.0] * 5, rng.uniform(0, 1, 195)])) @ basis.T
    plain = hutchinson(lambda v: v @ matrix, [signs(rng, 200, 60)])
    better = hutch_plus_plus(lambda v: v @ matrix, [signs(rng, 200, 20)], [signs(rng, 200, 20)])
    assert better.std() / np.sqrt(20) < plain.std() / np.sqrt(60) / 3
    assert better.mean() == pytest.approx(np.trace(matrix), abs=4 * better.std() / np.sqrt(20))


def of_spectrum(rng, eigenvalues):
    basis, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))
    return (basis * eigenvalues) @ basis.T


def squared_norm_by_each(rng, matrix, num_products):
    """Return the mean estimates of ||A||_F^2 of both methods from as many products."""
    size, third = len(matrix), num_products // 3
    probes = signs(rng, size, num_products)
    sketch, rest = probes[:third], probes[2 * third :]
    plain = hutchinson(lambda v: v @ matrix, [probes], squared_norms)
    deflated = hutch_plus_plus(lambda v: v @ matrix, [sketch], [rest], squared_norms)
    return plain.mean(), deflated.mean()


@pytest.mark.parametrize("num_sketches", [1, 3, 5])
def test_squared_norms_over_all_probes_are_the_frobenius_norm(rng, num_sketches):
    """The mean over all 2^W vectors of signs is the expectation, for whatever basis is found."""
    matrix = symmetric(rng, 5)
    probes = [np.array(list(itertools.product([-1.0, 1.0], repeat=5)))]
    plain = hutchinson(lambda v: v @ matrix, probes, squared_norms)
    assert plain.mean() == pytest.approx(np.sum(matrix**2), rel=1e-13)
    sketches = [rng.normal(size=(num_sketches, 5))]
    deflated = hutch_plus_plus(lambda v: v @ matrix, sketches, probes, squared_norms)
    assert deflated.mean() == pytest.approx(np.sum(matrix**2), rel=1e-13)
    assert np.all(deflated > 0)


def test_deflated_norm_is_exact_where_the_rank_is_below_that_of_the_sketch(rng):
    matrix = of_spectrum(rng, np.array([5.0, -3.0, 2.0] + 37 * [0.0]))
    sketches, probes = [signs(rng, 40, 5)], [signs(rng, 40, 4)]
    estimates = hutch_plus_plus(lambda v: v @ matrix, sketches, probes, squared_norms)
    np.testing.assert_allclose(estimates, 25 + 9 + 4, rtol=1e-12)


def test_deflated_norm_errs_far_less_where_the_spectrum_decays(rng):
    """Eigenvalues 1 / i: by the plain method the variance is 2 sum_i i^-4 / 100, nearly.

    With the 33 largest taken out it would be 2 sum_{i > 33} i^-4 / 34, whose root is 200 times
    smaller. Vectors of signs find them roughly: a tenth of that is asked for.
    """
    matrix = of_spectrum(rng, 1 / np.arange(1, 201))
    found = np.array([squared_norm_by_each(rng, matrix, 100) for _ in range(15)])
    plain, deflated = np.sqrt(np.mean((found / np.sum(matrix**2) - 1) ** 2, axis=0))
    assert plain > 0.05
    assert deflated < plain / 20


def test_deflated_norm_errs_little_more_where_the_spectrum_is_flat(rng):
    """A third of the probes are left for the rest, and the lengths of R z vary, W = 200, k = 33.

    The first makes the variance 100 / 34 times larger. By the second it grows by that of z^T R z /
    W, 2 k / W^2 at most, which vanishes for many weights. A root mean square of 50 errors is itself
    uncertain by 1 / sqrt(100) = 10 %, the ratio of two by 14 %: four times that is allowed for.
    """
    matrix = of_spectrum(rng, rng.uniform(0.5, 1.0, 200) * rng.choice([-1, 1], 200))
    found = np.array([squared_norm_by_each(rng, matrix, 100) for _ in range(50)])
    plain, deflated = np.mean((found / np.sum(matrix**2) - 1) ** 2, axis=0)
    assert np.sqrt(deflated) < 1.56 * np.sqrt((100 * plain + 2 * 33 / 200**2) / 34)
