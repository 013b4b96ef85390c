"""A measured number with its standard error."""

import dataclasses
import math

import numpy as np

from keras_infomcr.core.euclidean_norm import unit_of


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a measure of flatness returns.

    Attributes:
        value: Float, the measure.
        stderr: Float, its standard error: over the trials if there are several, else over what
            was drawn at random. NaN where that is not known.
        samples: Array, what `value` was made of: one number a trial, or a draw.
    """

    value: float
    stderr: float
    samples: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> "Estimate":
        """Return the mean of independent samples and its standard error.

        Args:
            samples: Array `[n]`.

        Returns:
            An `Estimate`.
        """
        samples = np.asarray(samples, "float64")
        return cls(float(np.mean(samples)), standard_error(samples), samples)


def standard_error(samples):
    """Return the standard error of the mean, NaN unless there are two finite numbers or more."""
    if len(samples) < 2 or not np.all(np.isfinite(samples)):
        return math.nan
    unit = unit_of(samples)
    return unit * float(np.std(np.asarray(samples) / unit, ddof=1)) / math.sqrt(len(samples))
