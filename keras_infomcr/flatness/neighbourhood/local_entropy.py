"""The local entropy: how much room a minimum has around it."""

import math
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


def local_entropy(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    gamma: float = 1e4,
    num_samples: int = 20,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
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
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        gamma: Float, greater than 0: the noise on each weight has the standard deviation
            1 / sqrt(gamma). Defaults to 1e4.
        num_samples: Integer, at least 1. Draws of xi, each a forward pass over the data.
            Defaults to 20.
        num_examples: As for `local_energy`.
        chunk_size: As for `local_energy`.
        loss: As for `hessian_trace`.
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
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    generator = np.random.default_rng(seed)
    weights, losses = function.weights(), []
    with progress_bar(num_samples, verbose) as progress:
        for _ in range(num_samples):
            noise = generator.standard_normal(function.size, function.dtype) / math.sqrt(gamma)
            losses.append(function.loss(data, function.point(weights + noise)))
            progress.add(1)
    least = min(losses)
    terms = np.exp(least - np.array(losses))
    value = math.log(terms.mean()) - least
    return Estimate(value, standard_error(terms) / float(terms.mean()), np.array(losses))
