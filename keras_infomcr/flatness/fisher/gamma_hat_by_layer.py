"""Gamma-hat of the layers of a model: which of them make a minimum sharp."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


@dataclasses.dataclass(frozen=True)
class GammaHatByLayer:
    """The result of `gamma_hat_by_layer`, for L layers in the order of the model's weights.

    Attributes:
        layers: Tuple of L strings, the paths of the layers that have trainable weights. Layers of
            the same path are taken together.
        num_weights: Tuple of L integers, the numbers of their trainable weights.
        values: Array `[L]`, gamma-hat with all weights but the layer's held fixed, natural
            logarithm. -inf where the layer's gradients are linearly dependent, as with fewer
            weights than a trial has examples.
        stderrs: Array `[L]`, standard errors over the trials, NaN for a single trial and for
            values that are not finite.
    """

    layers: tuple[str, ...]
    num_weights: tuple[int, ...]
    values: np.ndarray
    stderrs: np.ndarray


def gamma_hat_by_layer(
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
) -> GammaHatByLayer:
    """Measure gamma-hat of each layer: ln|J_l J_l^T|, J_l the gradients by the layer's weights.

    The matrix xi = J J^T of the model is the sum of J_l J_l^T over its layers l. Where a layer's
    gamma-hat is large, the loss is sharp in its weights.

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        num_examples: Integer, at least 1. N', the examples of a trial. If it is at most the
            number of weights of the smallest layer of interest, that layer's value is finite.
            Defaults to 100.
        num_trials: Integer, at least 1. The trials averaged. Defaults to 10.
        normalize_softmax: As for `gamma_hat`. Defaults to `False`.
        softmax_scale: As for `gamma_hat`. Defaults to 0.04.
        training: As for `gamma_hat`. Defaults to `False`.
        chunk_size: As for `gamma_hat`. Defaults to `num_examples`.
        seed: As for `gamma_hat`. Defaults to a new draw each time.
        loss: As for `gamma_hat`. Defaults to the compiled loss.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.

    Returns:
        A `GammaHatByLayer`, which `keras_infomcr.flatness.plot.by_layer` draws.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = gamma_hat_by_layer(model, x_train, y_train, num_examples=20)
    plot.by_layer(result).figure.savefig("layers.png")
    ```

    Reference: Eq. 5 and 6 of Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020 (https://arxiv.org/abs/1911.08192), for one layer's weights.
    """
    validation.integer(minimum=1, num_trials=num_trials)
    validation.one_of(0, 1, verbose=verbose)
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
    estimator = GammaHatEstimator(model, x, y, settings)
    trials = estimator.measure_layers(verbose)
    return GammaHatByLayer(
        estimator.layers,
        estimator.num_weights,
        trials.mean(axis=0),
        np.array([standard_error(trial) for trial in trials.T]),
    )
