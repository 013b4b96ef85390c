"""The local learning coefficient: how many directions the loss rises in around a minimum."""

import math
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling, warn
from keras_infomcr.flatness.running.progress import progress_bar


def local_learning_coefficient(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    gamma: float = 100.0,
    inverse_temperature: float | None = None,
    num_steps: int = 100,
    step_size: float = 0.05,
    num_chains: int = 4,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the local learning coefficient of a minimum, by Langevin dynamics.

        lambda = n beta (E[L(w')] - L(w)),    w' ~ exp(-n beta L(w') - gamma / 2 ||w' - w||^2)

    n is the number of examples and beta = 1 / ln(n). Smaller is flatter. At a minimum with
    curvatures c_i it is the sum of n beta c_i / (n beta c_i + gamma) / 2: half the number of
    directions with curvatures well above gamma / (n beta), and n beta / (2 gamma) times the trace
    of the Hessian where all are well below. Half the number of weights is its limit for gamma = 0
    if all curvatures are positive; a singular minimum, such as that of w^4, has less. Compare
    models at the same n and gamma only. It can be negative where the weights are no minimum.

    Each chain starts at the weights, and its second half is averaged. The steps are finite, which
    multiplies the term of c by (2 - s) / (2 - s (1 + n beta c / gamma)), s the step size: halve it,
    and double the number of steps, to see how much that matters. Batch normalisation is in
    inference mode. The model is left as it is.

    Reference: Lau, Furman, Wang, Murfet and Wei, "The Local Learning Coefficient: A
    Singularity-Aware Complexity Measure", AISTATS 2025 (https://arxiv.org/abs/2308.12108). There
    the steps see mini-batches; here they see all of the data.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        gamma: Float, greater than 0, the strength of the pull to the weights: where the loss is
            flat, each weight moves by some 1 / sqrt(gamma). Defaults to 100.
        inverse_temperature: Float, greater than 0, n beta; or `None`: n / ln(n), n the number of
            examples that are measured, at least 2. Defaults to `None`.
        num_steps: Integer, at least 2. Steps of a chain, each a forward and backward pass over
            the data. It takes 4 / step_size or more to forget the start. Defaults to 100.
        step_size: Float in (0, 1], the step as a multiple of 1 / gamma: the fraction of its
            distance from w that a chain loses in a step where the loss is flat. Chains diverge
            unless it is less than 2 / (1 + n beta c / gamma), c the largest curvature on their
            way. Defaults to 0.05.
        num_chains: Integer, at least 1, the chains averaged. Defaults to 4.
        num_examples: As for `local_energy`.
        chunk_size: As for `local_energy`.
        loss: As for `hessian_trace`.
        seed: As for `local_energy`.
        verbose: As for `local_energy`.

    Returns:
        An `Estimate`, its samples those of the chains, its standard error NaN for a single one.
        If chains diverge it is infinite or NaN, and a warning says so.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`, and if there is one example only and no
            `inverse_temperature`.

    Example:

    ```python
    result = local_learning_coefficient(model, x_train, y_train, num_examples=1000, seed=0)
    print(f"{result.value:.1f} +- {result.stderr:.1f}")
    ```
    """
    validation.positive(gamma=gamma)
    if inverse_temperature is not None:
        validation.positive(inverse_temperature=inverse_temperature)
    validation.integer(minimum=2, num_steps=num_steps)
    validation.integer(minimum=1, num_chains=num_chains)
    validation.fraction(step_size=step_size)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    generator = np.random.default_rng(seed)
    deviation = math.sqrt((1 - (1 - step_size) ** 2) / gamma)
    weights = function.weights()

    def rise():
        """Return how far above the minimum the second half of a chain is, in the mean."""
        displacement, slope, losses = 0.0, first_slope, []
        for _ in range(num_steps):
            noise = deviation * generator.standard_normal(function.size, function.dtype)
            force = n_beta / gamma * slope
            displacement = (1 - step_size) * displacement - step_size * force + noise
            loss, slope = function.gradient(data, function.point(weights + displacement))
            losses.append(loss)
            progress.add(1)
        return np.mean(losses[num_steps // 2 :]) - minimum

    with progress_bar(num_chains * num_steps + 1, verbose) as progress:
        minimum, first_slope = function.gradient(data, function.point(weights))
        progress.add(1)
        n_beta = inverse_temperature or _n_beta(data)
        with np.errstate(over="ignore", invalid="ignore"):  # of chains that diverge
            samples = n_beta * np.array([rise() for _ in range(num_chains)])
    if not np.all(np.isfinite(samples)):
        warn(
            "The chains must not diverge. Received: "
            f"step_size={step_size!r}, gamma={gamma!r}, for n beta = {n_beta:.3g}. Pass a smaller "
            "`step_size`, with more steps, or a larger `gamma`."
        )
    return Estimate.of(samples)


def _n_beta(data) -> float:
    """Return n / ln(n) for the n examples of data."""
    count = sum(len(keras.tree.flatten(x)[0]) for x, _ in data)
    if count < 2:
        raise ValueError(
            "n / ln(n) needs 2 examples or more. Received: 1 example. Give more data, or pass "
            "`inverse_temperature`."
        )
    return count / math.log(count)
