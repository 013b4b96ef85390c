"""Pictures of the loss along directions through the weights, and between two models."""

from typing import Any

import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.plot.axes import check_result, new_axes
from keras_infomcr.flatness.surface.loss_between import LossBetween
from keras_infomcr.flatness.surface.loss_surface import LossSurface

# Where the largest loss is so many times the least, the scale is logarithmic, and ends at the
# fraction of the largest below which there is nothing to see but the bottom of a valley.
_LARGE_RANGE, _SMALLEST = 20, 1e-4

# The fraction of a contour picture that a line must surround to have a label.
_LABELLED = 0.04


def loss_surface(result: LossSurface, axes: Any = None, *, kind: str = "contour") -> Any:
    """Draw the loss on a line, with the 0-1 error, or on a plane.

    Where the losses range widely, their scale is logarithmic. The title has the seed, because
    another one gives another picture. A cross marks the model.

    Args:
        result: A `LossSurface`, the result of `loss_surface`.
        axes: `matplotlib.axes.Axes`, or `None` for new ones; for a surface they must be
            three-dimensional (`figure.add_subplot(projection="3d")`).
        kind: `"contour"`, or `"surface"` in three dimensions. It has no part in a line. Defaults
            to `"contour"`.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `LossSurface`.
        ValueError: If `kind` is none of the above, or the axes do not fit it.
    """
    check_result(result, LossSurface, "`loss_surface(model, x, y)`")
    validation.one_of("contour", "surface", kind=kind)
    plane = result.losses.ndim == 2
    solid = plane and kind == "surface"
    if axes is None:
        settings = {"projection": "3d"} if solid else {}
        axes = new_axes(height=5.0, **settings) if plane else new_axes()
    if (axes.name == "3d") != solid:
        number, projection = ("three", "'3d'") if solid else ("two", "None")
        raise ValueError(
            f"`axes` must have {number} dimensions here. Received: axes={axes!r}, kind={kind!r}, "
            f"a result of {result.losses.ndim} directions. Make the axes by "
            f"`figure.add_subplot(projection={projection})`."
        )
    draw = _draw_solid if solid else _draw_contours if plane else _draw_line
    draw(result, axes)
    axes.set_xlabel(f"steps along {result.names[0]}")
    how = f"{result.normalize}-normalised, " if result.normalize else ""
    axes.set_title(f"a slice of the loss, {how}seed {result.seed}", fontsize="medium")
    return axes


def loss_between(result: LossBetween, axes: Any = None) -> Any:
    """Draw the loss and the 0-1 error on the line between two models, and mark the barrier.

    Args:
        result: A `LossBetween`, the result of `loss_between`.
        axes: `matplotlib.axes.Axes`, or `None` for new ones. The error has an axis of its own on
            the right.

    Returns:
        The axes of the loss.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `LossBetween`.
    """
    check_result(result, LossBetween, "`loss_between(model, other, x, y)`")
    axes = new_axes() if axes is None else axes
    _draw_loss_and_error(result, axes)
    chord = np.interp(result.coordinates, [0, 1], result.losses[[0, -1]])
    axes.plot(result.coordinates, chord, "--", color="C0", linewidth=1)
    if result.barrier > 0:
        top = np.nanargmax(result.losses - chord)
        ends = [chord[top], result.losses[top]]
        axes.plot([result.coordinates[top]] * 2, ends, ":", color="black")
    axes.set_title(f"barrier {result.barrier:.3g}", fontsize="medium")
    axes.set_xlabel("position on the line, from the model (0) to the other (1)")
    return axes


def _draw_loss_and_error(result: LossSurface | LossBetween, axes: Any) -> None:
    axes.plot(result.coordinates, result.losses, color="C0")
    axes.set_ylabel("mean loss", color="C0")
    if np.isfinite(result.errors).any():
        right = axes.twinx()
        right.plot(result.coordinates, result.errors, color="C1")
        right.set_ylabel("0-1 error, a fraction", color="C1")


def _draw_line(result: LossSurface, axes: Any) -> None:
    _draw_loss_and_error(result, axes)
    if _ranges_widely(result.losses):
        axes.set_yscale("log")


def _draw_contours(result: LossSurface, axes: Any) -> None:
    # Matplotlib's rows are the vertical axis.
    losses = np.ma.masked_invalid(result.losses.T)
    grid = result.coordinates, result.coordinates, losses
    settings = {"levels": 12}
    if _ranges_widely(result.losses):
        low = max(losses.min(), _SMALLEST * losses.max())
        settings = {"levels": np.geomspace(low, losses.max(), 13), "norm": "log"}
    axes.contourf(*grid, extend="min", cmap="viridis", alpha=0.8, **settings)
    lines = axes.contour(*grid, colors="black", linewidths=0.6, **settings)
    # Around a narrow valley the labels of the innermost lines would cover each other.
    wide = [level for level in lines.levels if np.mean(losses < level) > _LABELLED]
    axes.clabel(lines, wide, fontsize="x-small", fmt=lambda v: f"{float(f'{v:.2g}'):g}")
    if result.coordinates[0] < 0 < result.coordinates[-1]:
        axes.plot(0, 0, "+", color="red", markersize=10)
    axes.set_aspect("equal")
    axes.set_ylabel(f"steps along {result.names[1]}")


def _draw_solid(result: LossSurface, axes: Any) -> None:
    losses = np.ma.masked_invalid(result.losses.T)
    label = "mean loss"
    if _ranges_widely(result.losses):
        # Three-dimensional axes have no logarithmic scale that works.
        losses = np.log10(np.maximum(losses, _SMALLEST * losses.max()))
        label = "mean loss, log10"
    grid = np.meshgrid(result.coordinates, result.coordinates)
    axes.plot_surface(*grid, losses, cmap="viridis", rstride=1, cstride=1)
    for name in ("x", "y", "z"):
        axes.locator_params(axis=name, nbins=5)
        axes.tick_params(axis=name, labelsize="small")
    axes.set_box_aspect(None, zoom=0.85)  # leaves room for the labels
    axes.set_ylabel(f"steps along {result.names[1]}")
    axes.set_zlabel(label)


def _ranges_widely(losses: np.ndarray) -> bool:
    finite = losses[np.isfinite(losses)]
    return finite.size > 0 and finite.max() > _LARGE_RANGE * finite.min() > 0
