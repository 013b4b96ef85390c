"""Average adaptive sharpness: how far noise scaled by the weights raises the loss."""

from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


def average_adaptive_sharpness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    rho: float = 0.1,
    norm: str = "l2",
    num_samples: int = 20,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Measure average adaptive sharpness: the mean rise of the loss under noise on the weights.

        E[L(w + rho |w| z)] - L(w),    z ~ N(0, I), or uniform in [-1, 1] for l-inf

    over all of the data. Batch normalisation is in inference mode. The model is left as it is.

    Reference: As `adaptive_sharpness`, whose worst case this replaces by a mean.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        rho: Float, greater than 0, the strength of the noise. Defaults to 0.1.
        norm: `"l2"` for normal, `"l-inf"` for uniform noise. Defaults to `"l2"`.
        num_samples: Integer, at least 1, the draws of z. The standard error falls as the square
            root of their number. Defaults to 20.
        num_examples: As for `adaptive_sharpness`.
        chunk_size: As for `local_energy`.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the draws. Defaults to 0.

    Returns:
        An `Estimate`, its samples the rises at the draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = average_adaptive_sharpness(model, x_train, y_train, seed=0)
    ```
    """
    validation.one_of("l2", "l-inf", norm=norm)
    validation.positive(rho=rho)
    validation.integer(minimum=1, num_samples=num_samples)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    generator = np.random.default_rng(seed)
    weights = function.weights()

    def noise():
        if norm == "l2":
            return generator.standard_normal(function.size, function.dtype)
        return generator.uniform(-1, 1, function.size).astype(function.dtype)

    rises = []
    with progress_bar(num_samples, verbose) as progress:
        undisturbed = function.loss(data, function.point())
        for _ in range(num_samples):
            disturbed = weights + rho * np.abs(weights) * noise()
            rises.append(function.loss(data, function.point(disturbed)) - undisturbed)
            progress.add(1)
    return Estimate.of(rises)
