"""The norm of the gradient of the local entropy."""

import math
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import unit_of
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


def local_entropy_gradient_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    gamma: float = 1e4,
    num_steps: int = 20,
    step_size: float = 0.5,
    num_chains: int = 4,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the norm of the gradient of the local entropy, by Langevin dynamics.

        grad F(w) = -gamma (w - <w'>),    w' ~ exp(-L(w') - gamma / 2 ||w' - w||^2)

    Each chain steps through weights w' and, with the same noise, through weights drawn from the
    Gaussian alone, whose mean is w. What is averaged is the difference of the two, over the
    second half of the steps: the noise, which is far larger, drops out. The squared norm is
    estimated by the products of different chains, whose noise is not in it.

    Reference: Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", ICLR
    2017, Eq. 7 and Algorithm 1 (https://arxiv.org/abs/1611.01838). There the noise is scaled down
    and the steps see mini-batches; here they see all of the data.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        gamma: As for `local_entropy`.
        num_steps: Integer, at least 2. Steps of a chain, each a forward and backward pass over
            the data. It takes 10 / step_size or more to forget the start. Defaults to 20.
        step_size: Float in (0, 1], the step as a multiple of 1 / gamma: the fraction of its
            distance from w that a chain loses in a step. Chains diverge unless it is less than
            2 / (1 + c / gamma), c the largest curvature. Defaults to 0.5.
        num_chains: Integer, at least 2, the chains averaged. Defaults to 4.
        num_examples: As for `local_energy`.
        chunk_size: As for `local_energy`.
        loss: As for `hessian_trace`.
        seed: As for `local_energy`.
        verbose: As for `local_energy`.

    Returns:
        An `Estimate`, 0 where the noise exceeds the gradient. Its samples are the norms that the
        chains give by themselves, noise included; its standard error, by the jackknife over
        chains, is NaN for two of them.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = local_entropy_gradient_norm(model, x_train, y_train, num_examples=1000, seed=0)
    ```
    """
    validation.positive(gamma=gamma)
    validation.integer(minimum=2, num_steps=num_steps)
    validation.integer(minimum=2, num_chains=num_chains)
    validation.fraction(step_size=step_size)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    generator = np.random.default_rng(seed)
    weights, first = function.weights(), num_steps // 2

    def noise(variance):
        return generator.standard_normal(function.size, function.dtype) * math.sqrt(
            variance / gamma
        )

    def gradient():
        """Return gamma (w - <w'>) as one chain gives it."""
        # `difference` is gamma times the difference of the two chains of weights.
        gaussian, difference, total = noise(1), 0.0, 0.0
        for step in range(num_steps):
            _, slope = function.gradient(
                data, function.point(weights + gaussian + difference / gamma)
            )
            progress.add(1)
            difference = (1 - step_size) * difference - step_size * slope
            gaussian = (1 - step_size) * gaussian + noise(1 - (1 - step_size) ** 2)
            total = total + (difference if step >= first else 0)
        return -total / (num_steps - first)

    with progress_bar(num_chains * num_steps, verbose) as progress:
        gradients = np.array([gradient() for _ in range(num_chains)])
    unit = unit_of(gradients)
    gradients = gradients.astype("float64") / unit
    with np.errstate(invalid="ignore"):  # chains that have diverged give NaN
        found = _norm_of_mean(gradients @ gradients.T)
    return Estimate(unit * found.value, unit * found.stderr, unit * found.samples)


def _norm_of_mean(gram):
    """Return the norm of the expectation of independent vectors, given their Gram matrix."""
    count = len(gram)

    def square(gram):
        return (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))

    value, stderr = square(gram), math.nan
    if count > 2:
        rest = [np.delete(np.delete(gram, i, 0), i, 1) for i in range(count)]
        stderr = math.sqrt((count - 1) * np.var([square(g) for g in rest]))
    norm = math.sqrt(max(value, 0.0)) if math.isfinite(value) else math.nan
    # The error of a root. Where the square is lost in its noise, the norm may well be as large as
    # the root of the noise.
    stderr = stderr / (2 * norm) if value > stderr else math.sqrt(stderr)
    return Estimate(norm, stderr, np.sqrt(np.diag(gram)))
