"""Adaptive sharpness: how far the loss rises within a neighbourhood scaled by the weights."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import euclidean_norm, unit_of
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


def adaptive_sharpness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    rho: float = 0.5,
    norm: str = "l2",
    num_steps: int = 20,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Measure adaptive sharpness: the worst rise of the loss around the weights, by their sizes.

        max { L(w + |w| v) : ||v|| <= rho } - L(w)

    Each chunk of the data has a worst case of its own; their rises are averaged over the examples.
    Batch normalisation is in inference mode. The maximum is sought by normalised gradient ascent
    from w: what is found is at most the maximum, and 0 where the gradient vanishes. The model is
    left as it is.

    Reference: Kwon, Kim, Park and Choi, "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021,
    Eq. 3 (https://arxiv.org/abs/2102.11600); Andriushchenko, Croce, Mueller, Hein and Flammarion,
    "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023
    (https://arxiv.org/abs/2302.07011).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        rho: Float, greater than 0, the radius. With `norm="l-inf"` some 0.005 is usual. Defaults
            to 0.5.
        norm: `"l2"` or `"l-inf"`. Defaults to `"l2"`.
        num_steps: Integer, at least 1, the steps of ascent. Defaults to 20.
        num_examples: Integer, at least 1: so many examples are drawn (1024 in the second
            reference); if the data come in batches, the first are read. Or `None`: all examples
            are measured. Defaults to `None`.
        chunk_size: Integer, at least 1: examples that go through the model together, and share
            one worst case. The fewer they are, the larger is their rise. Defaults to 128.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.
        verbose: 0 or 1. With 1, a progress bar counts the chunks. Defaults to 0.

    Returns:
        An `Estimate`, its samples the rises of the chunks.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = adaptive_sharpness(model, x_train, y_train, rho=0.5, seed=0)
    ```
    """
    validation.one_of("l2", "l-inf", norm=norm)
    validation.positive(rho=rho)
    validation.integer(minimum=1, num_steps=num_steps)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    weights = function.weights()
    scale = np.abs(weights)

    def loss_and_slope(batch, v):
        value, gradient = function.gradient([batch], function.point(weights + scale * v))
        return value, scale * gradient

    rises, sizes = [], []
    with progress_bar(None, verbose) as progress:
        for batch in data:
            attacked = functools.partial(loss_and_slope, batch)
            rises.append(_ascent(attacked, np.zeros_like(weights), rho, norm, num_steps))
            sizes.append(len(keras.tree.flatten(batch)[0]))
            progress.add(1)
    value = float(np.average(rises, weights=sizes))
    return Estimate(value, standard_error(rises), np.array(rises))


def _ascent(
    value_and_slope: Callable, start: np.ndarray, rho: float, norm: str, num_steps: int
) -> float:
    """Return how far a function rises within a ball around `start`.

    A step is of the length 2 rho at first. After one that led down, the ascent goes on from the
    best point in steps half as long.

    Args:
        value_and_slope: Function of an array `[W]` that returns a float and an array `[W]`.
        start: Array `[W]`, zeros.
        rho: Float, the radius.
        norm: `"l2"` or `"l-inf"`.
        num_steps: Integer.
    """

    def projected(v):
        if norm == "l-inf":
            return np.clip(v, -rho, rho)
        return v * min(1.0, rho / (euclidean_norm(v) or 1.0))

    def direction(slope):
        if norm == "l-inf":
            return np.sign(slope)
        slope = slope / unit_of(slope)
        return slope / (euclidean_norm(slope) or 1.0)

    point, step = start, 2 * rho
    first, slope = value_and_slope(point)
    best, best_point, best_slope = first, point, slope
    for _ in range(num_steps):
        # A slope that is not finite leads nowhere: the loss is infinite there, or NaN.
        if not np.isfinite(slope).all():
            return best - first if math.isinf(best) else math.nan
        point = projected(point + step * direction(slope))
        value, slope = value_and_slope(point)
        if value > best:
            best, best_point, best_slope = value, point, slope
        else:
            point, slope, step = best_point, best_slope, step / 2
    return best - first
