"""How sharp a minimum may be before training by gradient descent leaves it."""

import math
from collections.abc import Callable

import keras

from keras_infomcr.regularizers.sharpness_aware import SharpnessAware
from keras_infomcr.scalars import to_float


def stability_threshold(model: keras.Model, gradient_norm: Callable[[], float]) -> float:
    """Return the largest eigenvalue of the Hessian at which training, as it is now, is stable.

    Gradient descent at the rate r with the momentum b and the weight decay d, on a quadratic,
    diverges along an eigenvector whose eigenvalue exceeds

        l* = (1 + b) (2/r - d)                  2/r without either
        l* = (1 + b) (2/r - d) / (1 + 2 b)      with Nesterov's momentum

    where the larger root of the recurrence of (w, m) passes -1. Sharpness-aware minimisation at
    the strength s descends by (H + s rho H^2 / ||g||), where g is along the eigenvector, so that

        l + s rho l^2 / ||g|| = l*

    Reference: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient Descent on Neural Networks
    Typically Occurs at the Edge of Stability", ICLR 2021, Sec. 2 and Appendix B
    (https://arxiv.org/abs/2103.00065); Long and Bartlett, "Sharpness-Aware Minimization and the
    Edge of Stability", JMLR 2024 (https://arxiv.org/abs/2309.12488).

    Args:
        model: A compiled `keras.Model`.
        gradient_norm: Function of no arguments that returns ||g||, which is called under
            `SharpnessAware` alone.

    Returns:
        Float; NaN where no threshold is known: for optimizers other than `SGD`, and under
        regularisers other than `SharpnessAware` in its plain form (not adaptive, one sub-batch,
        along the gradient).
    """
    threshold = _of_optimizer(model.optimizer)
    rule = getattr(model, "regularizer", None)
    active = rule is not None and getattr(model, "regularizer_active", True)
    strength = to_float(rule.strength) if active else 0.0
    if not strength or math.isnan(threshold):
        return threshold
    plain = type(rule) is SharpnessAware and not rule.adaptive
    if not plain or rule.num_sub_batches > 1 or rule.direction != "gradient":
        return math.nan
    return _with_radius(threshold, strength * to_float(rule.rho), gradient_norm())


def _of_optimizer(optimizer: keras.optimizers.Optimizer) -> float:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # A subclass may take steps of its own.
    if getattr(type(optimizer), "update_step", None) is not keras.optimizers.SGD.update_step:
        return math.nan
    rate, momentum = to_float(optimizer.learning_rate), optimizer.momentum
    if rate == 0:
        return math.inf
    threshold = (1 + momentum) * (2 / rate - (optimizer.weight_decay or 0.0))
    return threshold / (1 + 2 * momentum) if optimizer.nesterov else threshold


def _with_radius(threshold: float, rho: float, norm: float) -> float:
    """Return the root l of l + rho l^2 / norm = threshold, in a form that does not cancel."""
    if norm == 0:
        return 0.0
    return 2 * threshold / (1 + math.sqrt(1 + 4 * rho * threshold / norm))
