"""The Fisher information of a few examples: its spectral radius, Frobenius norm and trace."""

from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import euclidean_norm
from keras_infomcr.core.spectral_norms import spectral_norms
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.fisher.gamma_hat import checked_settings
from keras_infomcr.flatness.per_example.gamma_hat_estimator import shared_estimator
from keras_infomcr.flatness.running.checks import warn
from keras_infomcr.flatness.running.progress import progress_bar


def fisher_spectral_radius(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_trials: int = 10,
    verbose: int = 0,
    **settings: Any,
) -> Estimate:
    """Compute the spectral radius of the Fisher information I of the examples of a trial.

        I = (1 / N') J^T J,    rho(I) = lambda_max(J J^T) / N',    J_i = grad l_i

    with l_i the loss of the example alone, as for `gamma_hat`: without label smoothing, `add_loss`,
    penalties and, of one output, `loss_weights`.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`. Labels count by their largest entry.
        num_trials: Integer, at least 1. T, the trials averaged. Defaults to 10.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.
        **settings: `num_examples`, `training`, `chunk_size`, `seed`, `normalize_softmax` and
            `softmax_scale`, as for `gamma_hat`.

    Returns:
        An `Estimate`, exact for the examples of each trial.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = fisher_spectral_radius(model, x_train, y_train, seed=0)
    ```
    """
    return _measured(
        lambda gram: spectral_norms(gram[None])[0], model, x, y, num_trials, verbose, settings
    )


def fisher_frobenius_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_trials: int = 10,
    verbose: int = 0,
    **settings: Any,
) -> Estimate:
    """Compute the Frobenius norm of the Fisher information I of the examples of a trial.

        ||I||_F = ||J J^T||_F / N'

    with J as for `fisher_spectral_radius`. The reference takes the square of this.

    Reference: As `fisher_spectral_radius`.

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`. Labels count by their largest entry.
        num_trials: Integer, at least 1. T, the trials averaged. Defaults to 10.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.
        **settings: As for `fisher_spectral_radius`.

    Returns:
        An `Estimate`, exact for the examples of each trial.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = fisher_frobenius_norm(model, x_train, y_train, seed=0)
    ```
    """
    return _measured(euclidean_norm, model, x, y, num_trials, verbose, settings)


def fisher_trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_trials: int = 10,
    verbose: int = 0,
    **settings: Any,
) -> Estimate:
    """Compute the trace of the Fisher information I of the examples of a trial.

        tr I = tr(J J^T) / N',    the mean of ||grad l_i||^2

    with l_i as for `fisher_spectral_radius`.

    Reference: As `fisher_spectral_radius`.

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`. Labels count by their largest entry.
        num_trials: Integer, at least 1. T, the trials averaged. Defaults to 10.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.
        **settings: As for `fisher_spectral_radius`.

    Returns:
        An `Estimate`, exact for the examples of each trial.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = fisher_trace(model, x_train, y_train, seed=0)
    ```
    """
    return _measured(np.trace, model, x, y, num_trials, verbose, settings)


def _measured(statistic, model, x, y, num_trials, verbose, settings):
    validation.integer(minimum=1, num_trials=num_trials)
    validation.one_of(0, 1, verbose=verbose)
    settings = checked_settings(num_trials=num_trials, **settings)
    estimator = shared_estimator(model, x, y, settings)
    samples = []
    with progress_bar(num_trials, verbose) as progress:
        for gram in estimator.measure_grams():
            samples.append(statistic(gram) / len(gram))
            progress.add(1)
    limits = np.finfo("float64")
    if np.max(samples) < limits.tiny / limits.eps:
        warn(
            "The Fisher information is zero, or too small for float64. Received: a model whose "
            f"examples give {np.max(samples):.0e} at most. Use `gamma_hat`, a logarithm."
        )
    return Estimate.of(samples)
