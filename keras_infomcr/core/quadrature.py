"""Gauss's quadrature from a tridiagonal matrix, and the density that it stands for."""

import math

import numpy as np


def quadrature(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of Gauss's quadrature for a symmetric tridiagonal matrix.

    A matrix that is not finite gives one node, NaN.
    """
    if not np.isfinite(matrix).all():
        return np.full(1, np.nan), np.ones(1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2


def blurred_density(
    grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, width: float
) -> np.ndarray:
    """Return the density, at the points of a grid, of weights that Gaussians blur about nodes.

    Args:
        grid: Array `[G]`.
        nodes: Array `[n]`.
        weights: Array `[n]`, of the sum 1.
        width: Float, greater than 0, the standard deviation of the Gaussians.
    """
    distances = (grid[:, None] - nodes) / width
    return np.exp(-(distances**2) / 2) @ weights / (width * np.sqrt(2 * np.pi))


def grid_for(nodes: np.ndarray, width: float) -> np.ndarray:
    """Return the points of a grid: four for each width, up to five widths beyond the nodes."""
    start, end = nodes.min() - 5 * width, nodes.max() + 5 * width
    steps = math.ceil(4 * (end - start) / width) if np.isfinite(end - start) else 0
    return np.linspace(start, end, max(1000, steps))
