"""Gauss's quadrature and blurred densities, on plain matrices."""

import math

import numpy as np
import pytest

from keras_infomcr.core.lanczos import tridiagonal
from keras_infomcr.core.quadrature import blurred_density, grid_for, quadrature


def test_moments_are_exact_up_to_twice_the_number_of_nodes(rng):
    """sum_i w_i n_i^k = v^T A^k v of a unit vector v, for k < 2 m after m Lanczos steps."""
    half = rng.normal(size=(12, 12))
    matrix, start = (half + half.T) / 10, rng.normal(size=12)
    nodes, weights = quadrature(tridiagonal(lambda v: matrix @ v, start, 4))
    unit = start / np.linalg.norm(start)
    for power in range(8):
        expected = unit @ np.linalg.matrix_power(matrix, power) @ unit
        assert weights @ nodes**power == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_diagonal_matrix_gives_its_first_entry_all_the_weight():
    nodes, weights = quadrature(np.diag([3.0, 1.0, 2.0]))
    np.testing.assert_array_equal(nodes, [1, 2, 3])
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-15)


def test_a_matrix_that_is_not_finite_gives_one_node_that_is_none():
    nodes, weights = quadrature(np.array([[np.nan, 1.0], [1.0, 2.0]]))
    assert np.isnan(nodes).all() and nodes.shape == weights.shape == (1,)


@pytest.mark.parametrize("width", [0.01, 3.0])
def test_density_is_the_sum_of_gaussians(width):
    nodes, weights = np.array([-1.0, 2.0]), np.array([0.25, 0.75])
    grid = grid_for(nodes, width)
    assert grid[0] == -1 - 5 * width and grid[-1] == 2 + 5 * width
    assert np.diff(grid).max() <= width / 4 * (1 + 1e-3) or len(grid) == 1000
    density = blurred_density(grid, nodes, weights, width)
    # What lies beyond five widths, and the error of the trapezoids.
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    assert np.trapezoid(density * grid, grid) == pytest.approx(weights @ nodes, abs=1e-4)
    [at_node] = blurred_density(np.array([2.0]), nodes[1:], np.ones(1), width)
    assert at_node == pytest.approx(1 / (width * math.sqrt(2 * math.pi)))


def test_grid_of_nodes_that_are_not_finite_has_a_thousand_points():
    assert grid_for(np.full(1, np.nan), 1.0).shape == (1000,)
