"""The mean over trials of a statistic of the Fisher information of the trial's examples."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.flatness.running.checks import warn


def trial_mean(
    statistic: Callable[[np.ndarray], float],
    model: keras.Model,
    x: Any,
    y: Any,
    settings: TrialSettings,
    verbose: int,
) -> Estimate:
    """Return the mean over trials of a statistic of (1 / N') J J^T.

    Args:
        statistic: Function of an array `[N', N']`, of degree one: a factor comes out of it.
        model: As for `gamma_hat`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        settings: `TrialSettings`.
        verbose: As for `gamma_hat`.
    """
    validation.integer(minimum=1, num_trials=settings.num_trials)  # "auto" is gamma-hat's alone
    validation.one_of(0, 1, verbose=verbose)
    estimator = GammaHatEstimator(model, x, y, settings)
    samples = estimator.measure_matrices(statistic, verbose) / settings.num_examples
    limits = np.finfo("float64")
    if np.max(samples) < limits.tiny / limits.eps:
        warn(
            "The Fisher information is zero, or too small for float64. Received: a model whose "
            f"examples give {np.max(samples):.0e} at most. Use `gamma_hat`, a logarithm."
        )
    return Estimate.of(samples)
