"""InfoMCR's bound on the loss of unseen examples."""

import dataclasses
import math

import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class PacBayesBound(Estimate):
    """What `pac_bayes_bound` returns.

    Attributes:
        value: Float, the bound on the expected loss of unseen examples; infinity where it exceeds
            the range of float64.
        stderr: NaN: how far the numbers that the bound is made of are wrong is not known here.
        samples: Array `[1]`, the bound.
        log_complexity: Float, ln A.
    """

    log_complexity: float


def pac_bayes_bound(
    train_loss: float,
    gamma: float,
    num_weights: int,
    num_examples: int,
    log_volume: float,
    delta: float = 0.05,
) -> PacBayesBound:
    """Bound the expected loss of unseen examples around a minimum.

        E_Q[L(D)] <= E_Q[L(S)] + 2 sqrt((2 L0 + 2 A + ln(2 N / delta)) / (N - 1))
        A = W V^(2/W) pi^(1/W) exp(gamma / W) / (4 pi e)

    with probability 1 - delta at least, for weights drawn by Q from a neighbourhood of the
    minimum. It is a basin in which the loss is quadratic (Assumption 2), so that E_Q[L(S)] is at
    most the loss at its rim, which is put in its place: L0 + h, with

        h = (V Gamma(W/2 + 1))^(2/W) exp(gamma / W) / (2 pi),

    to which A tends for many weights. The powers are taken of logarithms, so that millions of
    weights do not overflow.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Theorem 1 (https://arxiv.org/abs/1911.08192).

    Args:
        train_loss: Float, at least 0. L0, the training loss at the minimum.
        gamma: Float, the log-determinant of the Fisher information, as `gamma` estimates it.
            -inf, of a singular one, makes A zero.
        num_weights: Integer, at least 1. W.
        num_examples: Integer, at least 2. N, the number of training examples.
        log_volume: Float, ln V, the volume of the neighbourhood of the minimum that the bound is
            for; natural logarithm.
        delta: Float in (0, 1], the probability that the bound fails. Defaults to 0.05.

    Returns:
        A `PacBayesBound`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    result = gamma(model, x_train, y_train)
    bound = pac_bayes_bound(loss, result.value, result.num_weights, len(x_train), log_volume)
    ```
    """
    validation.non_negative(train_loss=train_loss)
    validation.integer(minimum=1, num_weights=num_weights)
    validation.integer(minimum=2, num_examples=num_examples)
    validation.fraction(delta=delta)
    validation.number(gamma=gamma, log_volume=log_volume)
    log_complexity = (
        math.log(num_weights / (4 * math.pi * math.e))
        + (2 * log_volume + math.log(math.pi) + gamma) / num_weights
    )
    log_height = (
        2 * (log_volume + math.lgamma(num_weights / 2 + 1)) + gamma
    ) / num_weights - math.log(2 * math.pi)
    # `math.exp` raises an error beyond e^709.
    complexity, height = (
        math.exp(a) if a < 709 else math.inf for a in (log_complexity, log_height)
    )
    spread = 2 * train_loss + 2 * complexity + math.log(2 * num_examples / delta)
    value = train_loss + height + 2 * math.sqrt(spread / (num_examples - 1))
    return PacBayesBound(value, math.nan, np.array([value]), log_complexity)
