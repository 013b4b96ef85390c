"""The spectral density of the Hessian: how many curvatures there are of each size."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.lanczos import tridiagonal
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.hessian.operator import measure_hessian


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """What `hessian_spectral_density` returns.

    Attributes:
        value: Array `[G]`, the fraction of the eigenvalues per unit of their size, blurred by a
            Gaussian of the standard deviation `width`. Its integral is 1.
        stderr: Array `[G]`, its standard error: over the trials if there are several, else over
            the probes. NaN for a single one.
        grid: Array `[G]`, the sizes, ascending.
        width: Float.
        num_weights: Integer, W, the number of eigenvalues.
    """

    value: np.ndarray
    stderr: np.ndarray
    grid: np.ndarray
    width: float
    num_weights: int


def hessian_spectral_density(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_probes: int = 3,
    num_steps: int = 50,
    width: float | None = None,
    **settings: Any,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of the Hessian of the loss by the weights.

    By stochastic Lanczos quadrature: from each random probe so many Lanczos steps give as many
    nodes and weights of a quadrature for the density.

    Reference: Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via
    Hessian Eigenvalue Density", ICML 2019 (https://arxiv.org/abs/1901.10159).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_probes: Integer, at least 1, of all the data or a trial. Defaults to 3.
        num_steps: Integer, at least 1, the Hessian-vector products a probe: details finer than
            the range of the eigenvalues over this number are blurred. Defaults to 50.
        width: Float, greater than 0, or `None`: a hundredth of the range of the eigenvalues.
            Defaults to `None`.
        **settings: `num_examples`, `num_trials`, `batch_size`, `training`, `seed` and `verbose`,
            as for `hessian_trace`.

    Returns:
        A `SpectralDensity`, which `keras_infomcr.flatness.plot.spectral_density` draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_spectral_density(model, x_train, y_train, num_examples=1000, num_trials=1)
    plot.spectral_density(result).figure.savefig("density.png")
    ```
    """
    validation.integer(minimum=1, num_probes=num_probes, num_steps=num_steps)
    if width is not None:
        validation.positive(width=width)
    sizes = []

    def quadratures(hessian):
        sizes.append(hessian.size)
        probes = (probe for some in hessian.probes(num_probes) for probe in some)
        return [_quadrature(tridiagonal(hessian.product, p, num_steps)) for p in probes]

    trials = measure_hessian(quadratures, model, x, y, num_probes * num_steps, **settings)
    rules = [rule for trial in trials for rule in trial]
    nodes = np.concatenate([nodes for nodes, _ in rules])
    width = width or float(np.ptp(nodes)) / 100 or abs(float(nodes[0])) / 100 or 1.0
    start, end = nodes.min() - 5 * width, nodes.max() + 5 * width
    steps = math.ceil(4 * (end - start) / width) if np.isfinite(end - start) else 0
    grid = np.linspace(start, end, max(1000, steps))
    densities = np.array([[_blurred(grid, *rule, width) for rule in trial] for trial in trials])
    densities = densities[0] if len(trials) == 1 else densities.mean(axis=1)
    stderr = np.array([standard_error(column) for column in densities.T])
    return SpectralDensity(densities.mean(axis=0), stderr, grid, width, sizes[0])


def _quadrature(matrix):
    """Return the nodes and weights of Gauss's quadrature for a tridiagonal matrix."""
    if not np.isfinite(matrix).all():
        return np.full(1, np.nan), np.ones(1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2


def _blurred(grid, nodes, weights, width):
    distances = (grid[:, None] - nodes) / width
    return np.exp(-(distances**2) / 2) @ weights / (width * np.sqrt(2 * np.pi))
