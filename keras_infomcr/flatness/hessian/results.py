"""What the measures of the Hessian return, where one number is not enough."""

import dataclasses

import numpy as np

from keras_infomcr.flatness.estimate import Estimate


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
    """

    eigenvalues: np.ndarray


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


def mean_estimate(trials: list[np.ndarray]) -> Estimate:
    """Return the `Estimate` of the samples of one trial, or of the means of several trials."""
    return Estimate.of(trials[0] if len(trials) == 1 else [np.mean(t) for t in trials])
