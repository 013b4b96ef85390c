"""Pictures of spectra."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_infomcr.flatness.hessian.spectral_density import SpectralDensity
from keras_infomcr.flatness.plot.axes import check_labels, check_result, new_axes

_EIGENVALUE = "eigenvalue of the Hessian"
# The height of a row of several, as a multiple of the distance between two.
_HEIGHT = 1.4


def spectral_density(
    result: SpectralDensity | Sequence[SpectralDensity],
    axes: Any = None,
    labels: Sequence[Any] | None = None,
) -> Any:
    """Draw a spectral density on a logarithmic scale, or several, one below the other.

    The scale ends at the density that a hundredth of one eigenvalue has. Smaller densities are
    rounding errors of the method. One density is drawn with its standard error.

    Args:
        result: A `SpectralDensity`, the result of `hessian_spectral_density`, or a sequence of
            them, such as of the epochs of a training.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.
        labels: Sequence, what each of several results is called, from the top downwards. Defaults
            to 1, 2 and so on.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `SpectralDensity` and holds none.
        ValueError: If there are not as many labels as results.

    Example:

    ```python
    plot.spectral_density([at_start, in_the_middle, at_the_end], labels=["0", "10", "20"])
    ```
    """
    several = isinstance(result, (list, tuple))
    results = list(result) if several else [result]
    for one in results:
        check_result(one, SpectralDensity, "`hessian_spectral_density(model, x, y)`")
    labels = check_labels(labels, results)
    if axes is None:
        axes = new_axes(height=1.2 + 0.55 * len(results)) if several else new_axes()
    (_draw_rows(axes, results, labels) if several else _draw_one(axes, result))
    axes.set_xlabel(_EIGENVALUE)
    return axes


def _draw_one(axes: Any, result: SpectralDensity):
    floor = _floor(result)
    errors = np.nan_to_num(result.stderr)
    axes.semilogy(result.grid, np.maximum(result.value, floor))
    low, high = (np.maximum(result.value + sign * errors, floor) for sign in (-1, 1))
    axes.fill_between(result.grid, low, high, alpha=0.3)
    axes.set_ylim(bottom=floor)
    axes.set_ylabel("fraction of the eigenvalues per unit")


def _draw_rows(axes: Any, results: list[SpectralDensity], labels: list[str]):
    """Draw densities above each other, all on one scale of so many powers of ten a row."""
    floor = max(map(_floor, results))
    decades = max(np.log10(r.value.max() / floor) for r in results)
    for row, result in enumerate(results):
        logarithms = np.log10(np.maximum(result.value, floor) / floor)
        heights = row - _HEIGHT * logarithms / decades
        # What stands further down hides what is behind it.
        layer = {"zorder": 2 + row / len(results)}
        axes.fill_between(result.grid, row, heights, color="white", **layer)
        axes.fill_between(result.grid, row, heights, color=f"C{row % 10}", alpha=0.4, **layer)
        axes.plot(result.grid, heights, color=f"C{row % 10}", linewidth=1, **layer)
    axes.set_yticks(range(len(results)), labels)
    axes.set_ylim(len(results) - 0.9, -_HEIGHT - 0.1)
    axes.set_ylabel(f"density per unit, log scale:\na row is {decades / _HEIGHT:.1f} powers of 10")


def _floor(result: SpectralDensity) -> float:
    return 0.01 / (result.num_weights * result.width)
