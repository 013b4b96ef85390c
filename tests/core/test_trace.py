"""Traces against matrices that are known."""

import itertools

import numpy as np
import pytest

from keras_infomcr.core.trace import hutch_plus_plus, hutchinson


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
