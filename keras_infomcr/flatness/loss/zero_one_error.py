"""The 0-1 error of a classifier: the fraction of the examples that it gets wrong."""

from typing import Any

import keras
from keras import ops

from keras_infomcr.flatness.loss.batch_loss import BatchLoss
from keras_infomcr.flatness.loss.example_values import kind_of_loss
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.keras_internals import get_keras_mask


class LossAndError(LossFunction):
    """The loss and the 0-1 error over data, batch normalisation in inference mode.

    Args:
        model: As for `LossFunction`.
        loss: As for `hessian_trace`.
    """

    def __init__(self, model: keras.Model, loss: Any = None):
        super().__init__(model, training=False, loss=loss)
        batch = self.batch
        self._loss_and_error = compiled_for(
            model,
            ("loss_and_error", self.bearer),
            lambda: batch.compiled(lambda *args: _loss_and_error(batch, *args)),
        )

    def loss_and_error(self, data, weights, state) -> tuple[float, float]:
        """Return the loss and the 0-1 error; the error is NaN if there are no classes."""
        means = self.mean(self._loss_and_error, data, (self.arrays(weights), state))
        loss, error = (float("nan") if mean is None else float(mean) for mean in means)
        return loss, error


def _loss_and_error(batch: BatchLoss, weights: list, state: list, x: Any, y: Any) -> tuple:
    loss, outputs = batch.evaluate(weights, state, x, y)
    return loss, zero_one_error(batch.bearer, y, outputs)


def zero_one_error(bearer: keras.Model, y: Any, outputs: Any) -> Any:
    """Return the 0-1 error of a batch, a scalar, or `None` if the loss is of no classes.

    Args:
        bearer: What bears the loss, as `resolved_loss` returns it.
        y: Structure of arrays, the labels.
        outputs: Structure of arrays, the outputs.
    """
    loss, kind = kind_of_loss(bearer, outputs)
    if kind is None:
        return None
    y, outputs = (keras.tree.flatten(a)[0] for a in (y, outputs))
    mask = get_keras_mask(outputs)
    if kind == "binary":
        threshold = 0.0 if getattr(loss, "from_logits", False) else 0.5
        y = ops.cast(ops.reshape(y, ops.shape(outputs)), outputs.dtype)
        right = ops.equal(y >= 0.5, outputs > threshold)[..., 0]
    elif "sparse" in getattr(loss, "__name__", type(loss).__name__).lower():
        right = keras.metrics.sparse_categorical_accuracy(y, outputs)
    else:
        right = keras.metrics.categorical_accuracy(y, outputs)
    wrong = 1 - ops.cast(right, "float32")
    if mask is None:
        return ops.mean(wrong)
    mask = ops.cast(mask, "float32")
    return ops.sum(mask * wrong) / ops.maximum(ops.sum(mask), 1)
