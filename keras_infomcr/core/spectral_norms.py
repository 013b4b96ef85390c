"""The spectral norms of matrices."""

import numpy as np


def spectral_norms(matrices):
    """Return the largest singular value of each of an array `[n, ...]` of matrices.

    NaN of a matrix that is not finite, of which NumPy raises an error.
    """
    finite = np.isfinite(matrices).all(axis=(1, 2))
    norms = np.full(len(matrices), np.nan)
    norms[finite] = np.linalg.norm(matrices[finite], 2, axis=(1, 2))
    return norms
