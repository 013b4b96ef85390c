"""One loss of Keras for each example of a batch, as Keras computes it for the example alone."""

from typing import Any

import keras
from keras import ops

from keras_infomcr.keras_internals import get_keras_mask
from keras_infomcr.objective import is_loss_by_example

_SUMS = ("sum", "none", None)


def loss_of_each(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Any:
    """Return the loss of each example, an array `[N]`.

    Keras makes the mean or the sum over all positions of a batch, or all that a mask keeps; here it
    is taken over the positions of each example.

    Args:
        loss: A loss that `computes_each` one by itself.
        y_true: Array `[N, ...]`, the labels.
        y_pred: Array `[N, ...]`, the output, perhaps with a mask.
    """
    losses, masks = _by_position(loss, y_true, y_pred)
    losses = ops.reshape(losses, (losses.shape[0], -1))
    weights = ops.ones_like(losses)
    for mask in masks:
        weights = weights * ops.cast(ops.reshape(mask, losses.shape), losses.dtype)
    total = ops.sum(losses * weights, axis=1)
    if loss.reduction in _SUMS:
        return total
    return ops.divide_no_nan(total, ops.sum(weights, axis=1))


def computes_each(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> bool:
    """Return whether `loss_of_each` is known to be right, by what one example looks like.

    Args:
        loss: A loss of one output.
        y_true: Array `[1, ...]`, the labels.
        y_pred: Array `[1, ...]`, the output.
    """
    if not is_loss_by_example(loss) or keras.tree.is_nested(y_pred):
        return False
    if not _are_lined_up(loss, y_true.shape, y_pred.shape):
        return False
    losses, masks = _by_position(loss, y_true, y_pred)
    return all(tuple(mask.shape) == tuple(losses.shape) for mask in masks) and (
        # Without a reduction Keras's loss of one example is one number only by chance.
        loss.reduction not in ("none", None) or ops.size(losses) == 1
    )


def _are_lined_up(loss: Any, of_labels: tuple, of_outputs: tuple) -> bool:
    """Return whether an example's labels meet its own outputs, however many there are of both.

    Shapes of different rank are broadcast from their ends, so that examples meet positions.
    """
    if len(of_outputs) < 2 or not of_labels or not of_labels[0] == of_outputs[0] == 1:
        return False
    surplus = len(of_outputs) - len(of_labels)
    by_class = loss.fn in (keras.losses.sparse_categorical_crossentropy, keras.losses.ctc)
    return (
        surplus == 0
        or (surplus == 1 and (by_class or of_outputs[-1] == 1))
        or (surplus == -1 and of_labels[-1] == 1)
    )


def _by_position(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> tuple[Any, list]:
    """Return the losses of all positions, and the masks of them that there are."""
    arrays = (ops.convert_to_tensor(array, dtype=loss.dtype) for array in (y_true, y_pred))
    losses = loss.call(*arrays)
    masks = get_keras_mask(y_pred), get_keras_mask(losses)
    return losses, [mask for mask in masks if mask is not None]
