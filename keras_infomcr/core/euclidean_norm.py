"""Euclidean norms of arrays of numbers of any size."""

import math

import numpy as np


def unit_of(array):
    """Return the largest size of a number in an array, or 1.0 if that is 0 or not finite.

    Squares of what is divided by it neither overflow nor, where they count, vanish.
    """
    size = float(np.max(np.abs(array), initial=0))
    return size if 0 < size < math.inf else 1.0


def euclidean_norm(array):
    """Return the root of the sum of squares, a float; infinity or NaN if the array holds them."""
    unit = unit_of(array)
    flat = np.ravel(array) / unit
    return unit * math.sqrt(np.einsum("w,w->", flat, flat, dtype="float64"))
