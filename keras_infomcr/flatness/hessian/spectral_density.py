"""The spectral density of the Hessian: how many curvatures there are of each size."""

from typing import Any

import keras

from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.results import SpectralDensity


def hessian_spectral_density(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_probes: int = 3,
    num_steps: int = 50,
    width: float | None = None,
    num_examples: int | None = None,
    num_trials: int = 10,
    chunk_size: int = 128,
    training: bool = False,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of the Hessian of the loss by the weights.

    It is estimated by stochastic Lanczos quadrature: from each random probe, `num_steps` Lanczos
    steps give as many nodes and weights of a quadrature for the density.

    Reference: Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via
    Hessian Eigenvalue Density", ICML 2019 (https://arxiv.org/abs/1901.10159).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_probes: Integer, at least 1. Random vectors, for all of the data or for each trial.
            Defaults to 3.
        num_steps: Integer, at least 1. Hessian-vector products for each probe: details finer than
            the range of the eigenvalues divided by this number are blurred. Defaults to 50.
        width: Float, greater than 0, the standard deviation of the Gaussians that blur the
            eigenvalues; or `None`: a hundredth of their range. Defaults to `None`.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

    Returns:
        A `SpectralDensity`, which `keras_infomcr.flatness.plot.spectral_density` draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_spectral_density(model, x_train, y_train, num_examples=1000, num_trials=1)
    plot.spectral_density(result).figure.savefig("density.png")
    ```
    """
    hessian = Hessian(
        model,
        x,
        y,
        num_examples=num_examples,
        num_trials=num_trials,
        chunk_size=chunk_size,
        training=training,
        loss=loss,
        seed=seed,
        verbose=verbose,
    )
    return hessian.spectral_density(num_probes=num_probes, num_steps=num_steps, width=width)
