"""Gamma-hat of the layers of a model: which of them make a minimum sharp."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.fisher.gamma_hat import checked_settings
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator


@dataclasses.dataclass(frozen=True)
class GammaHatByLayer:
    """What `gamma_hat_by_layer` returns, for L layers in the order of the model's weights.

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
    model: keras.Model, x: Any, y: Any = None, *, num_trials: int = 10, **settings: Any
) -> GammaHatByLayer:
    """Measure gamma-hat of each layer: ln|J_l J_l^T|, J_l the gradients by the layer's weights.

    The matrix xi = J J^T of the model is the sum of J_l J_l^T over its layers l. Where a layer's
    gamma-hat is large, the loss is sharp in its weights.

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        num_trials: Integer, at least 1. The trials averaged. Defaults to 10.
        **settings: The other arguments of `gamma_hat`. With `num_examples` at most the number of
            weights of the smallest layer of interest, its value is finite.

    Returns:
        A `GammaHatByLayer`, which `keras_infomcr.flatness.plot.gamma_hat_by_layer` draws.

    Raises:
        TypeError: As `gamma_hat`.
        ValueError: As `gamma_hat`.

    Example:

    ```python
    result = gamma_hat_by_layer(model, x_train, y_train, num_examples=20)
    plot.gamma_hat_by_layer(result).figure.savefig("layers.png")
    ```

    Reference: Eq. 5 and 6 of Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020 (https://arxiv.org/abs/1911.08192), for one layer's weights.
    """
    validation.integer(minimum=1, num_trials=num_trials)
    settings = checked_settings(num_trials=num_trials, **settings)
    estimator = GammaHatEstimator(model, x, y, **settings)
    trials = estimator.measure_layers()
    return GammaHatByLayer(
        estimator.layers,
        estimator.num_weights,
        trials.mean(axis=0),
        np.array([standard_error(trial) for trial in trials.T]),
    )
