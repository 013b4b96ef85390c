"""The log-determinant of the Fisher information of all weights, estimated from gamma-hat."""

import dataclasses
import math
from typing import Any

import keras

from keras_infomcr.flatness.fisher.gamma_hat import GammaHat, gamma_hat


@dataclasses.dataclass(frozen=True)
class Gamma:
    """What `gamma` returns.

    Attributes:
        value: Float, gamma(w), natural logarithm. Smaller is flatter.
        stderr: Float, its standard error over the trials, NaN for a single trial.
        num_weights: Integer, W.
        gamma_hat: The `GammaHat` that it was made of.
    """

    value: float
    stderr: float
    num_weights: int
    gamma_hat: GammaHat


def gamma(
    model: keras.Model, x: Any, y: Any = None, *, num_examples: int = 100, **settings: Any
) -> Gamma:
    """Estimate the log-determinant of the Fisher information I(w) of all weights.

        gamma(w) = ln|I(w)| ~ (W / N') gamma-hat + W ln(1 / W)

    with W the number of trainable weights: each eigenvalue of J J^T of a trial stands for W / N'
    of those of W I. An affine function of gamma-hat, it ranks models of one architecture alike;
    use it where W differs, or in a bound.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Eq. 7 (https://arxiv.org/abs/1911.08192).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        **settings: The other arguments of `gamma_hat`.

    Returns:
        A `Gamma`.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = gamma(model, x_train, y_train, num_trials=10, seed=0)
    ```
    """
    result = gamma_hat(model, x, y, num_examples=num_examples, **settings)
    num_weights = sum(math.prod(v.shape) for v in model.trainable_variables)
    scale = num_weights / num_examples
    value = scale * result.value - num_weights * math.log(num_weights)
    return Gamma(value, scale * result.stderr, num_weights, result)
