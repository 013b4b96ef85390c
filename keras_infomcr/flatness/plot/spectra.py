"""Pictures of spectra."""

from typing import Any

import numpy as np

from keras_infomcr.flatness.hessian.spectral_density import SpectralDensity
from keras_infomcr.flatness.plot.axes import check_result, new_axes


def spectral_density(result: SpectralDensity, axes: Any = None) -> Any:
    """Draw the spectral density on a logarithmic scale, with its standard error.

    The scale ends at the density that a hundredth of one eigenvalue has. Smaller densities are
    rounding errors of the method.

    Args:
        result: A `SpectralDensity`, the result of `hessian_spectral_density`.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `SpectralDensity`.
    """
    check_result(result, SpectralDensity, "`hessian_spectral_density(model, x, y)`")
    if axes is None:
        axes = new_axes()
    floor = 0.01 / (result.num_weights * result.width)
    errors = np.nan_to_num(result.stderr)
    axes.semilogy(result.grid, np.maximum(result.value, floor))
    low, high = (np.maximum(result.value + sign * errors, floor) for sign in (-1, 1))
    axes.fill_between(result.grid, low, high, alpha=0.3)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("fraction of the eigenvalues per unit")
    return axes
