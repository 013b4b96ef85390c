"""Pictures of what noise on the weights does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.neighbourhood.local_energy import LocalEnergy
from keras_infomcr.flatness.plot.axes import check_labels, check_result, new_axes


def local_energy(
    result: LocalEnergy | Sequence[LocalEnergy],
    axes: Any = None,
    labels: Sequence[Any] | None = None,
    quantity: str = "error",
) -> Any:
    """Draw how far noise raises the error or the loss, over its strength, with standard errors.

    Args:
        result: A `LocalEnergy` of a grid of sigmas, or a sequence of them: of training and test
            data, or of several networks.
        axes: `matplotlib.axes.Axes`, or `None` for new ones.
        labels: Sequence, what each of several results is called in the legend. Defaults to 1, 2
            and so on.
        quantity: `"error"` for the 0-1 error, which the measure's reference draws, or `"loss"`.
            Defaults to `"error"`.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `result` is no `LocalEnergy` and holds none.
        ValueError: If a result is of a single sigma, its error is not known, or there are not as
            many labels as results.

    Example:

    ```python
    grid = [0.0, 0.1, 0.2, 0.3, 0.4]
    results = [local_energy(model, *data, sigma=grid, seed=0) for data in (train, test)]
    plot.local_energy(results, labels=["training data", "test data"])
    ```
    """
    validation.one_of("error", "loss", quantity=quantity)
    several = isinstance(result, (list, tuple))
    results = list(result) if several else [result]
    for one in results:
        _check(one, quantity)
    labels = check_labels(labels, results)
    axes = new_axes() if axes is None else axes
    for one, label in zip(results, labels):
        order = np.argsort(one.sigma)
        values, errors = (one.error, one.error_stderr) if quantity == "error" else (
            one.value, one.stderr)  # fmt: skip
        unit = 100 if quantity == "error" else 1
        values, errors = unit * values[order], unit * np.nan_to_num(errors[order])
        axes.errorbar(one.sigma[order], values, errors, marker=".", capsize=2, label=label)
    if several:
        axes.legend()
    axes.set_xlabel("strength of the noise, sigma")
    axes.set_ylabel(
        "rise of the error, percentage points" if quantity == "error" else "rise of the loss"
    )
    return axes


def _check(result: Any, quantity: str):
    check_result(result, LocalEnergy, "`local_energy(model, x, y, sigma=[...])`")
    if np.ndim(result.sigma) == 0:
        raise ValueError(
            "`result` must be of several sigmas. "
            f"Received: result of sigma={result.sigma!r}. Call `local_energy(..., sigma=[...])`."
        )
    if quantity == "error" and not np.isfinite(result.error).any():
        raise ValueError(
            "The 0-1 error must be known, which it is for one cross-entropy alone. "
            f"Received: result of error={result.error!r}. Pass `quantity='loss'`."
        )
