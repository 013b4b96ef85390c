"""The Frobenius norm of the Fisher information of a few examples."""

from typing import Any

import keras

from keras_infomcr.core.euclidean_norm import euclidean_norm
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.fisher.trial_mean import trial_mean
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


def fisher_frobenius_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_examples: int = 100,
    num_trials: int = 10,
    normalize_softmax: bool = False,
    softmax_scale: float = 0.04,
    training: bool = False,
    chunk_size: int | None = None,
    seed: int | None = None,
    loss: Any = None,
    verbose: int = 0,
) -> Estimate:
    """Compute the Frobenius norm of the Fisher information I of the examples of a trial.

        ||I||_F = ||J J^T||_F / N'

    with J as for `fisher_spectral_radius`.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192). The paper
    takes the square of this.

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        num_trials: Integer, at least 1. T, the trials averaged. Defaults to 10.
        normalize_softmax: As for `gamma_hat`. Defaults to `False`.
        softmax_scale: As for `gamma_hat`. Defaults to 0.04.
        training: As for `gamma_hat`. Defaults to `False`.
        chunk_size: As for `gamma_hat`. Defaults to `num_examples`.
        seed: As for `gamma_hat`. Defaults to a new draw each time.
        loss: As for `gamma_hat`. Defaults to the compiled loss.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.

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
    settings = TrialSettings(
        num_examples=num_examples,
        num_trials=num_trials,
        normalize_softmax=normalize_softmax,
        softmax_scale=softmax_scale,
        training=training,
        chunk_size=chunk_size,
        seed=seed,
        loss=loss,
    )
    return trial_mean(euclidean_norm, model, x, y, settings, verbose)
