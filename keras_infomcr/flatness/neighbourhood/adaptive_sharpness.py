"""Adaptive sharpness: how far the loss rises within a neighbourhood scaled by the weights."""

import functools
import math
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
from keras_infomcr.flatness.running.shared import shared


def adaptive_sharpness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    kind: str = "worst",
    rho: float = 0.5,
    norm: str = "l2",
    num_steps: int = 20,
    num_samples: int = 20,
    num_examples: int | None = None,
    batch_size: int = 128,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Measure adaptive sharpness: the rise of the loss around the weights, each by its size.

        worst:      max { L(w + |w| v) : ||v|| <= rho } - L(w)
        average:    E[L(w + rho |w| z)] - L(w),    z ~ N(0, I), or uniform in [-1, 1] for l-inf

    The worst case is that of each batch for itself, averaged over the examples; the average is over
    all of the data. Batch normalisation is in inference mode. The maximum is sought by normalised
    gradient ascent from w: what is found is at most that, and 0 where the gradient vanishes. The
    model is left as it is.

    Reference: Kwon, Kim, Park and Choi, "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021,
    Eq. 3 (https://arxiv.org/abs/2102.11600); Andriushchenko, Croce, Mueller, Hein and Flammarion,
    "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023
    (https://arxiv.org/abs/2302.07011).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        kind: `"worst"` or `"average"`. Defaults to `"worst"`.
        rho: Float, greater than 0, the radius. Defaults to 0.5; with `"l-inf"` and `"worst"` some
            0.005, and with `"average"` some 0.1, are usual.
        norm: `"l2"` or `"l-inf"`. Defaults to `"l2"`.
        num_steps: Integer, at least 1, the steps of ascent. Defaults to 20.
        num_samples: Integer, at least 1, the draws of z for `"average"`. Defaults to 20.
        num_examples: Integer, at least 1: so many examples are drawn (1024 in the second
            reference), of data in batches the first are read; or `None`: all are measured.
            Defaults to `None`.
        batch_size: Integer, at least 1: examples that go through the model together, and share
            one worst case: the fewer, the larger it is. Defaults to 128.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the batches, or the draws. Defaults to 0.

    Returns:
        An `Estimate`, its samples the rises on the batches, or those of the draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = adaptive_sharpness(model, x_train, y_train, rho=0.5, seed=0)
    ```
    """
    validation.one_of("worst", "average", kind=kind)
    validation.one_of("l2", "l-inf", norm=norm)
    validation.positive(rho=rho)
    validation.integer(minimum=1, num_steps=num_steps, num_samples=num_samples)
    check_sampling(num_examples, 1, batch_size, seed, verbose)
    loss = shared(("loss", False), lambda: LossFunction(model), model)
    (data,) = trial_batches(x, y, num_examples, 1, batch_size, seed)
    generator = np.random.default_rng(seed)
    weights = loss.weights()
    scale = np.abs(weights)

    def noise():
        if norm == "l2":
            return generator.standard_normal(loss.size, loss.dtype)
        return generator.uniform(-1, 1, loss.size).astype(loss.dtype)

    def loss_and_slope(batch, v):
        value, gradient = loss.gradient([batch], loss.at(weights + scale * v))
        return value, scale * gradient

    rises, sizes = [], []
    with progress_bar(num_samples if kind == "average" else None, verbose) as progress:
        if kind == "average":
            here = loss.loss(data, loss.at())
            for _ in range(num_samples):
                rises.append(loss.loss(data, loss.at(weights + rho * scale * noise())) - here)
                progress.add(1)
            return Estimate.of(rises)
        for batch in data:
            attacked = functools.partial(loss_and_slope, batch)
            rises.append(_ascent(attacked, np.zeros_like(weights), rho, norm, num_steps))
            sizes.append(len(keras.tree.flatten(batch)[0]))
            progress.add(1)
    value = float(np.average(rises, weights=sizes))
    return Estimate(value, standard_error(rises), np.array(rises))


def _ascent(value_and_slope, start, rho, norm, num_steps):
    """Return how far a function rises within a ball around `start`.

    Steps are of length 2 rho, and half as long, from the best point, after one that led down.
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
        if not np.isfinite(slope).all():  # and nor is the loss, or it could not be raised
            return best - first if math.isinf(best) else math.nan
        point = projected(point + step * direction(slope))
        value, slope = value_and_slope(point)
        if value > best:
            best, best_point, best_slope = value, point, slope
        else:
            point, slope, step = best_point, best_slope, step / 2
    return best - first
