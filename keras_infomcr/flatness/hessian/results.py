"""What the measures of the Hessian return, where one number is not enough."""

import dataclasses

import numpy as np

from keras_infomcr.core.euclidean_norm import unit_of
from keras_infomcr.core.quadrature import blurred_density, grid_for
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.layers_of_weights import LayersOfWeights


@dataclasses.dataclass(frozen=True)
class SpectralRadius(Estimate):
    """What `hessian_spectral_radius` returns.

    Attributes:
        value: Float, the largest |eigenvalue|, averaged over the trials if there are any.
        stderr: Float, its standard error over the trials. NaN without trials.
        samples: Array, one number for each trial.
        largest: Float, the largest eigenvalue, averaged likewise.
        smallest: Float, the smallest eigenvalue, averaged likewise; negative, as a rule, unless
            the loss is convex.
    """

    largest: float
    smallest: float


@dataclasses.dataclass(frozen=True)
class TopEigenvalues(Estimate):
    """What `hessian_top_eigenvalues` returns.

    Attributes:
        value: Float, the first of the eigenvalues, averaged over the trials if there are any.
        stderr: Float, its standard error over the trials. NaN without trials.
        samples: Array `[T, num_eigenvalues]`, the eigenvalues of each trial; T is 1 without trials.
        eigenvalues: Array `[num_eigenvalues]`, the means over the trials of the eigenvalue that is
            the first by its size, of the second and so on, with their signs.
        vectors: Array `[num_eigenvalues, W]`, their eigenvectors as orthonormal rows, in the order
            of `Hessian.product`, each with either sign; `None` unless they were asked for.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class HessianTraceByLayer:
    """What `hessian_trace_by_layer` returns, for L layers in the order of the model's weights.

    Attributes:
        layers: Tuple of L strings, the paths of the layers that have trainable weights. Layers of
            the same path are taken together.
        num_weights: Tuple of L integers, the numbers of their trainable weights.
        values: Array `[L]`, the trace of the Hessian by the layer's weights alone. Their sum is
            the trace of the Hessian.
        stderrs: Array `[L]`, standard errors: over the trials if there are several, else over the
            random vectors. Errors of layers are not independent of each other.
        samples: Array `[n, L]`, the traces that `values` are the means of, one row for each trial
            or random vector. The sum of a row is an estimate of the trace of the Hessian.
    """

    layers: tuple[str, ...]
    num_weights: tuple[int, ...]
    values: np.ndarray
    stderrs: np.ndarray
    samples: np.ndarray

    @classmethod
    def of(cls, weights: LayersOfWeights, samples: np.ndarray) -> "HessianTraceByLayer":
        """Return the means of independent samples `[n, L]` and their standard errors."""
        stderrs = np.array([standard_error(column) for column in samples.T])
        return cls(weights.layers, weights.num_weights, samples.mean(axis=0), stderrs, samples)


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

    @classmethod
    def of_quadratures(
        cls, trials: list[list[tuple]], width: float | None, num_weights: int
    ) -> "SpectralDensity":
        """Return the density that the quadratures of the probes of each trial have in the mean."""
        nodes = np.concatenate([nodes for trial in trials for nodes, _ in trial])
        # A single node, or several that coincide, have no range to take a width from.
        width = width or float(np.ptp(nodes)) / 100 or abs(float(nodes[0])) / 100 or 1.0
        grid = grid_for(nodes, width)
        densities = of_draws_or_trials(
            [np.array([blurred_density(grid, *r, width) for r in trial]) for trial in trials]
        )
        stderr = np.array([standard_error(column) for column in densities.T])
        return cls(densities.mean(axis=0), stderr, grid, width, num_weights)


def of_draws_or_trials(trials: list[np.ndarray]) -> np.ndarray:
    """Return what the draws of one trial have given, or the means of each of several trials."""
    return trials[0] if len(trials) == 1 else np.array([np.mean(t, axis=0) for t in trials])


def root_of_mean(trials: list[np.ndarray]) -> Estimate:
    """Return the `Estimate` of the root of a mean of squares, given the roots of the squares."""
    # The squares of very small or very large numbers would vanish or overflow.
    unit = unit_of(trials)
    square = Estimate.of(of_draws_or_trials([(trial / unit) ** 2 for trial in trials]))
    root = np.sqrt(square.value)
    # The error of a root is half the relative error of the square.
    stderr = square.stderr / (2 * root) if root else square.stderr
    return Estimate(float(unit * root), float(unit * stderr), unit * np.sqrt(square.samples))
