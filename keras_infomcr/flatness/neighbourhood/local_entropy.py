"""The local entropy: how much room a minimum has around it."""

import math
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import unit_of
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar
from keras_infomcr.flatness.running.shared import shared


def local_entropy(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    gamma: float = 1e4,
    num_samples: int = 20,
    num_examples: int | None = None,
    batch_size: int = 128,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the local entropy of a minimum, by draws of weights around it.

        F(w) = ln E[exp(-L(w + xi))],    xi ~ N(0, I / gamma)

    which is ln of the integral of exp(-L(w') - gamma / 2 ||w' - w||^2) without the constant
    W / 2 ln(2 pi / gamma). Larger is flatter. Batch normalisation is in inference mode. The model
    is left as it is.

    Reference: Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", ICLR
    2017, Eq. 4 (https://arxiv.org/abs/1611.01838).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        gamma: Float, greater than 0: the noise on each weight has the standard deviation
            1 / sqrt(gamma). Defaults to 1e4.
        num_samples: Integer, at least 1. Draws of xi, each a forward pass over the data.
            Defaults to 20.
        num_examples: As for `local_energy`.
        batch_size: As for `local_energy`.
        seed: As for `local_energy`.
        verbose: As for `local_energy`.

    Returns:
        An `Estimate`, its samples the losses L(w + xi).

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = local_entropy(model, x_train, y_train, seed=0)
    ```
    """
    validation.positive(gamma=gamma)
    validation.integer(minimum=1, num_samples=num_samples)
    check_sampling(num_examples, 1, batch_size, seed, verbose)
    loss = shared(("loss", False), lambda: LossFunction(model), model)
    (data,) = trial_batches(x, y, num_examples, 1, batch_size, seed)
    generator = np.random.default_rng(seed)
    weights, losses = loss.weights(), []
    with progress_bar(num_samples, verbose) as progress:
        for _ in range(num_samples):
            noise = generator.standard_normal(loss.size, loss.dtype) / math.sqrt(gamma)
            losses.append(loss.loss(data, loss.at(weights + noise)))
            progress.add(1)
    least = min(losses)
    terms = np.exp(least - np.array(losses))
    value = math.log(terms.mean()) - least
    return Estimate(value, standard_error(terms) / float(terms.mean()), np.array(losses))


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
    batch_size: int = 128,
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
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        gamma: As for `local_entropy`.
        num_steps: Integer, at least 2. Steps of a chain, each a forward and backward pass over
            the data; 10 / step_size or more, to forget the start. Defaults to 20.
        step_size: Float in (0, 1], the step as a multiple of 1 / gamma: what part of its
            distance from w a chain loses in a step. Chains diverge unless it is less than
            2 / (1 + c / gamma), c the largest curvature. Defaults to 0.5.
        num_chains: Integer, at least 2, the chains averaged. Defaults to 4.
        num_examples: As for `local_energy`.
        batch_size: As for `local_energy`.
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
    check_sampling(num_examples, 1, batch_size, seed, verbose)
    loss = shared(("loss", False), lambda: LossFunction(model), model)
    (data,) = trial_batches(x, y, num_examples, 1, batch_size, seed)
    generator = np.random.default_rng(seed)
    weights, first = loss.weights(), num_steps // 2

    def noise(variance):
        return generator.standard_normal(loss.size, loss.dtype) * math.sqrt(variance / gamma)

    def gradient():
        """Return gamma (w - <w'>) as one chain gives it; `difference` is gamma times that."""
        gaussian, difference, total = noise(1), 0.0, 0.0
        for step in range(num_steps):
            _, slope = loss.gradient(data, loss.at(weights + gaussian + difference / gamma))
            progress.add(1)
            difference = (1 - step_size) * difference - step_size * slope
            gaussian = (1 - step_size) * gaussian + noise(1 - (1 - step_size) ** 2)
            total = total + (difference if step >= first else 0)
        return -total / (num_steps - first)

    with progress_bar(num_chains * num_steps, verbose) as progress:
        gradients = np.array([gradient() for _ in range(num_chains)])
    unit = unit_of(gradients)
    gradients = gradients.astype("float64") / unit
    with np.errstate(invalid="ignore"):  # of chains that have diverged
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
    # Of a root; where it is lost in the noise, as large as it may well be.
    stderr = stderr / (2 * norm) if value > stderr else math.sqrt(stderr)
    return Estimate(norm, stderr, np.sqrt(np.diag(gram)))
