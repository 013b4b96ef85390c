"""A measured number with its standard error."""

import dataclasses
import math
from typing import Any

import numpy as np

from keras_infomcr.core.euclidean_norm import unit_of


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The result of a measure of flatness that is one number.

    `float(result)` is `result.value`, so that a result can stand wherever a number can.

    Attributes:
        value: Float, the measure.
        stderr: Float, the standard error of `value`: over the trials if there are several, else
            over whatever was drawn at random. NaN where it is not known, as for a single trial.
        samples: Array, the numbers that `value` was made of: one for each trial or draw.
    """

    value: float
    stderr: float
    samples: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray, **others: Any) -> "Estimate":
        """Return the mean of independent samples and its standard error.

        Args:
            samples: Array `[n]`.
            **others: The attributes that a subclass adds to `value`, `stderr` and `samples`.

        Returns:
            An `Estimate`, or an object of the subclass that this was called on.
        """
        samples = np.asarray(samples, "float64")
        return cls(float(np.mean(samples)), standard_error(samples), samples, **others)

    def __float__(self) -> float:
        return float(self.value)


def standard_error(samples: np.ndarray) -> float:
    """Return the standard error of the mean, NaN unless there are two finite numbers or more."""
    if len(samples) < 2 or not np.all(np.isfinite(samples)):
        return math.nan
    # The squares of very large or very small numbers would overflow or vanish.
    unit = unit_of(samples)
    return unit * float(np.std(np.asarray(samples) / unit, ddof=1)) / math.sqrt(len(samples))
