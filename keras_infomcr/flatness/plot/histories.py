"""Pictures of measures over the epochs of a training."""

from typing import Any

import keras
import numpy as np

from keras_infomcr.flatness.plot.axes import new_axes


def gamma_hat(history: Any, axes: Any = None) -> Any:
    """Draw gamma-hat over the epochs, and the two parts that it is the sum of.

    The part of the losses says how well the examples are fitted, the other one is the geometry of
    the gradients. Epochs without a measurement are passed over.

    Args:
        history: `keras.callbacks.History`, which `fit` returns, or a dictionary of the logs, with
            the logs of `GammaHatCallback`. (`FlatnessCallback` logs gamma-hat without its parts.)
        axes: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If gamma-hat was not logged.

    Example:

    ```python
    history = model.fit(x, y, epochs=10, callbacks=[GammaHatCallback((x, y))])
    plot.gamma_hat(history)
    ```
    """
    logs = history.history if isinstance(history, keras.callbacks.History) else history
    names = "gamma_hat", "gamma_hat_stderr"
    if not all(name in logs for name in names):
        raise ValueError(
            "`history` must hold the logs of `GammaHatCallback`. "
            f"Received: history with {sorted(logs)}. Pass `callbacks=[GammaHatCallback((x, y))]` "
            "to `fit`."
        )
    value, stderr = (np.asarray(logs[name], "float64") for name in names)
    axes = new_axes() if axes is None else axes
    measured = np.isfinite(value)
    epochs = 1 + np.asarray(getattr(history, "epoch", range(len(value))))[measured]
    errors = np.nan_to_num(stderr[measured])
    axes.errorbar(epochs, value[measured], errors, marker=".", capsize=2, label="gamma-hat")
    if "gamma_hat_log_loss_part" in logs:
        log_loss = np.asarray(logs["gamma_hat_log_loss_part"], "float64")
        for part, label in ((log_loss, "part of the losses"), (value - log_loss, "geometry")):
            axes.plot(epochs, part[measured], "--", marker=".", label=label)
    axes.legend()
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("natural logarithm,\nsum over the examples of a trial")
    return axes
