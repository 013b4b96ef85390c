"""Pictures of how sharp the loss becomes in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_infomcr.flatness.plot.axes import new_axes

_EIGENVALUE = "hessian_eigenvalue_"
_THRESHOLD = "stability_threshold"


def sharpness(
    history: keras.callbacks.History | Mapping[str, Sequence[float]], axes: Any = None
) -> Any:
    """Draw the largest eigenvalues of the Hessian over training, and the edge of stability.

    The dashed line is the eigenvalue above which the optimizer diverges, 2/lr for gradient
    descent. Where none is known, as for Adam, the legend says so.

    Args:
        history: What `fit` returns with a `SharpnessCallback`; its `history`, a dictionary of
            logs; or the `record` of the callback, which has the measurements within epochs.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `history` is neither a `History` nor a dictionary.
        ValueError: If it has no eigenvalues.

    Reference: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient Descent on Neural Networks
    Typically Occurs at the Edge of Stability", ICLR 2021 (https://arxiv.org/abs/2103.00065).
    """
    logs = getattr(history, "history", history)
    if not isinstance(logs, Mapping):
        raise TypeError(
            "`history` must be a `History` or a dictionary of logs. "
            f"Received: history={history!r} (of type {type(history)})"
        )
    names = [name for name in logs if name.startswith(_EIGENVALUE)]
    if not names:
        raise ValueError(
            "`history` must have the logs of a `SharpnessCallback`. Received: a history of "
            f"{list(logs)}. Pass the callback to `fit`."
        )
    if axes is None:
        axes = new_axes()
    unit = "step" if "step" in logs else "epoch"
    times = logs.get("step", 1 + np.arange(len(logs[names[0]])))
    for name in names:
        label = f"eigenvalue {name.removeprefix(_EIGENVALUE)}"
        axes.plot(*_finite(times, logs[name]), label=label, linewidth=1.2)
    threshold = _finite(times, logs.get(_THRESHOLD, np.full(len(times), np.nan)))
    label = "stability threshold" if len(threshold[0]) else "no stability threshold is known"
    axes.plot(*threshold, "k--" if len(threshold[0]) else " ", label=label, linewidth=1)
    axes.set_xlabel(unit)
    axes.set_ylabel("eigenvalue of the Hessian")
    axes.legend(fontsize="small")
    return axes


def _finite(times: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the times and values of the measurements: logs are NaN where there was none."""
    measured = np.isfinite(values)
    return np.asarray(times)[measured], np.asarray(values)[measured]
