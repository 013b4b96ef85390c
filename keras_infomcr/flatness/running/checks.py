"""Checks of the models that are measured, and of the settings that measures share."""

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.objective import float8_scales


def check_compiled(model: Any, loss: Any = None):
    """Refuse what is no `keras.Model`, or has no loss, neither a compiled nor a given one."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r} (of type {type(model)})"
        )
    if loss is None and (not model.compiled or model.loss is None):
        raise ValueError(
            "The model must be compiled with a loss, or the measure be given one. Received: "
            f"model={model!r}, compiled with loss={getattr(model, 'loss', None)!r}. If it has a "
            "`train_step` or `compute_loss` of its own, pass `loss=...` to the measure, a loss of "
            "Keras or a function of `(y_true, y_pred)`; else call `model.compile(loss=...)`."
        )


def check_built(model: keras.Model):
    """Refuse a model that is not built, has no trainable weights or computes in float8."""
    if not model.built:
        raise ValueError(
            f"The model must be built. Received: model={model!r}. Call it on data first."
        )
    if not model.trainable_variables:
        raise ValueError(
            f"The model must have trainable weights. Received: model={model!r} without."
        )
    scales = float8_scales(model.trainable_variables)
    if scales:
        raise ValueError(
            "Layers must not be quantised to float8, through which nothing can be differentiated "
            f"twice. Received: float8 scales {scales}. Measure the model before it "
            "is quantised."
        )


def check_sampling(
    num_examples: int | None, num_trials: int, chunk_size: int, seed: int | None, verbose: int
):
    """Refuse settings that are out of their range."""
    validation.integer(minimum=1, num_trials=num_trials, chunk_size=chunk_size)
    validation.one_of(0, 1, verbose=verbose)
    if num_examples is not None:
        validation.integer(minimum=1, num_examples=num_examples)
    if seed is not None:
        validation.integer(minimum=0, seed=seed)


class MisfitWarning:
    """Warns that a model does not fit the data that it is measured on, once until it fits again."""

    def __init__(self):
        self._misfit = False

    def __call__(self, loss: float, guess: float):
        """Take in what is known of a measurement.

        Args:
            loss: Float, the mean cross-entropy. (NaN gives measures that are NaN.)
            guess: Float, the loss of equal probabilities, ln K; infinity if no guess is known.
        """
        misfit = loss > 2 * guess
        if misfit and not self._misfit:
            warn(
                f"The model does not fit the measured examples: their mean loss, {loss:.3g}, is "
                f"more than twice the loss of a uniform guess, {guess:.3g}. Training has diverged "
                "or has not begun, and however small a measure is, this is no flat minimum: do not "
                "compare it with the measures of models that fit."
            )
        self._misfit = misfit

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Let the measures called in this context warn by this, which remembers the last one."""
        token = _misfit_warning.set(self)
        try:
            yield
        finally:
            _misfit_warning.reset(token)


_misfit_warning = contextvars.ContextVar("misfit_warning", default=None)


def misfit_warning() -> MisfitWarning:
    """Return what a measurement warns by: a memory of its own, unless a callback gives it one."""
    return _misfit_warning.get() or MisfitWarning()


def warn(message: str):
    """Warn at the line of the user's that has called the package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith("keras_infomcr."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
