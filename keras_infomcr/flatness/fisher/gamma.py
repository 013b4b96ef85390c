"""The log-determinant of the Fisher information of all weights, estimated from gamma-hat."""

import dataclasses
import math
from typing import Any

import keras

from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.fisher.gamma_hat import GammaHat, gamma_hat


@dataclasses.dataclass(frozen=True)
class Gamma(Estimate):
    """The result of `gamma`: an `Estimate` of gamma(w), a natural logarithm.

    Attributes:
        value: Float, gamma(w). Smaller is flatter.
        stderr: Float, its standard error over the trials, NaN for a single trial.
        samples: Array `[T]`, gamma(w) by each trial.
        num_weights: Integer, W.
        gamma_hat: The `GammaHat` that it was made of.
    """

    num_weights: int
    gamma_hat: GammaHat


def gamma(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_examples: int = 100,
    num_trials: int | str = 10,
    relative_tolerance: float = 0.01,
    normalize_softmax: bool = False,
    softmax_scale: float = 0.04,
    training: bool = False,
    chunk_size: int | None = None,
    seed: int | None = None,
    loss: Any = None,
    verbose: int = 0,
) -> Gamma:
    """Estimate the log-determinant of the Fisher information I(w) of all weights.

        gamma(w) = ln|I(w)| ~ (W / N') gamma-hat + W ln(1 / W)

    with W the number of trainable weights: each eigenvalue of J J^T of a trial stands for W / N'
    eigenvalues of W I. It is an affine function of gamma-hat, so that it ranks models of one
    architecture alike; use it where W differs, or in a bound.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Eq. 7 (https://arxiv.org/abs/1911.08192).

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        num_trials: As for `gamma_hat`, but defaults to 10.
        relative_tolerance: As for `gamma_hat`. Defaults to 0.01.
        normalize_softmax: As for `gamma_hat`. Defaults to `False`.
        softmax_scale: As for `gamma_hat`. Defaults to 0.04.
        training: As for `gamma_hat`. Defaults to `False`.
        chunk_size: As for `gamma_hat`. Defaults to `num_examples`.
        seed: As for `gamma_hat`. Defaults to a new draw each time.
        loss: As for `gamma_hat`. Defaults to the compiled loss.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.

    Returns:
        A `Gamma`.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = gamma(model, x_train, y_train, seed=0)
    ```
    """
    result = gamma_hat(
        model,
        x,
        y,
        num_examples=num_examples,
        num_trials=num_trials,
        relative_tolerance=relative_tolerance,
        normalize_softmax=normalize_softmax,
        softmax_scale=softmax_scale,
        training=training,
        chunk_size=chunk_size,
        seed=seed,
        loss=loss,
        verbose=verbose,
    )
    num_weights = sum(math.prod(v.shape) for v in model.trainable_variables)
    scale, shift = num_weights / num_examples, num_weights * math.log(num_weights)
    return Gamma(
        value=scale * result.value - shift,
        stderr=scale * result.stderr,
        samples=scale * result.trials - shift,
        num_weights=num_weights,
        gamma_hat=result,
    )
