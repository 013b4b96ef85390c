"""Pictures of the results of measures. They need matplotlib."""

from typing import Any

import numpy as np

from keras_infomcr.flatness.fisher.gamma_hat_by_layer import GammaHatByLayer
from keras_infomcr.flatness.hessian.spectral_density import SpectralDensity


def gamma_hat_by_layer(result: GammaHatByLayer, axes: Any = None) -> Any:
    """Draw gamma-hat of each layer as a bar with its standard error.

    Layers whose value is not finite have no bar, and say so.

    Args:
        result: A `GammaHatByLayer`, the result of `gamma_hat_by_layer`.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `GammaHatByLayer`.
    """
    _check_result(result, GammaHatByLayer, "gamma_hat_by_layer")
    if axes is None:
        axes = _new_axes(height=0.8 + 0.22 * len(result.layers))
    finite = np.isfinite(result.values)
    positions = np.arange(len(result.layers))
    errors = np.nan_to_num(result.stderrs[finite])
    axes.barh(positions[finite], result.values[finite], xerr=errors)
    for position in positions[~finite]:
        axes.text(0.01, position, "not finite", va="center", fontsize="x-small",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(positions, result.layers, fontsize="x-small")
    axes.set_ylim(len(positions) - 0.5, -0.5)
    axes.set_xlabel("gamma-hat of the layer")
    return axes


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
    _check_result(result, SpectralDensity, "hessian_spectral_density")
    if axes is None:
        axes = _new_axes(height=3.5)
    floor = 0.01 / (result.num_weights * result.width)
    errors = np.nan_to_num(result.stderr)
    axes.semilogy(result.grid, np.maximum(result.value, floor))
    low, high = (np.maximum(result.value + sign * errors, floor) for sign in (-1, 1))
    axes.fill_between(result.grid, low, high, alpha=0.3)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("fraction of the eigenvalues per unit")
    return axes


def _check_result(result: Any, kind: type, measure: str) -> None:
    if not isinstance(result, kind):
        raise TypeError(
            f"`result` must be a `{kind.__name__}`. "
            f"Received: result={result!r} (of type {type(result)}). "
            f"Pass the result of `{measure}(model, x, y)`."
        )


def _new_axes(height: float) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`keras_infomcr.flatness.plot` needs matplotlib. Run `pip install matplotlib`."
        ) from error
    return pyplot.subplots(figsize=(6, height), layout="constrained")[1]
