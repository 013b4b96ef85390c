"""Pictures of what each layer does."""

from typing import Any

import numpy as np

from keras_infomcr.flatness.fisher.gamma_hat_by_layer import GammaHatByLayer
from keras_infomcr.flatness.hessian.results import HessianTraceByLayer
from keras_infomcr.flatness.plot.axes import check_result, new_axes

_QUANTITIES = {
    GammaHatByLayer: "gamma-hat of the layer",
    HessianTraceByLayer: "trace of the Hessian by the layer's weights",
}
_MEASURES = "`gamma_hat_by_layer(model, x, y)` or `hessian_trace_by_layer(model, x, y)`"


def by_layer(result: GammaHatByLayer | HessianTraceByLayer, axes: Any = None) -> Any:
    """Draw what was measured of each layer as a bar with its standard error.

    Layers whose value is not finite have no bar, and say so.

    Args:
        result: The result of `gamma_hat_by_layer` or of `hessian_trace_by_layer`.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is of another kind.
    """
    check_result(result, tuple(_QUANTITIES), _MEASURES)
    if axes is None:
        axes = new_axes(height=0.8 + 0.22 * len(result.layers))
    finite = np.isfinite(result.values)
    positions = np.arange(len(result.layers))
    errors = np.nan_to_num(result.stderrs[finite])
    axes.barh(positions[finite], result.values[finite], xerr=errors)
    for position in positions[~finite]:
        axes.text(0.01, position, "not finite", va="center", fontsize="x-small",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(positions, result.layers, fontsize="x-small")
    axes.set_ylim(len(positions) - 0.5, -0.5)
    axes.set_xlabel(_QUANTITIES[type(result)])
    return axes
