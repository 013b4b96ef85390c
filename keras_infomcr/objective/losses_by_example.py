"""Which losses of Keras map each example by itself."""

from typing import Any

import keras
from keras import losses

from keras_infomcr.keras_internals import loss_arguments

# Their values for an example do not depend on other examples.
_LOSSES_BY_EXAMPLE = (
    losses.mean_squared_error, losses.mean_absolute_error, losses.mean_absolute_percentage_error,
    losses.mean_squared_logarithmic_error, losses.huber, losses.log_cosh, losses.hinge,
    losses.squared_hinge, losses.categorical_hinge, losses.kl_divergence, losses.poisson,
    losses.cosine_similarity, losses.binary_crossentropy, losses.binary_focal_crossentropy,
    losses.categorical_crossentropy, losses.categorical_focal_crossentropy,
    losses.sparse_categorical_crossentropy, losses.ctc,
)  # fmt: skip


def is_loss_by_example(loss: Any) -> bool:
    """Return whether the values of a loss, before their reduction, are each of one example.

    Args:
        loss: A `keras.losses.Loss` or a function, or the name of one.
    """
    loss = losses.get(loss)
    is_object = isinstance(loss, losses.Loss)
    # A subclass of the user's may compute something else, or reduce it otherwise.
    usual = not is_object or (
        getattr(loss.call, "__func__", None) is losses.CategoricalCrossentropy.call
        and type(loss).__call__ is losses.Loss.__call__
    )
    axes = keras.tree.flatten(loss_arguments(loss).get("axis", -1))
    return (
        usual
        and getattr(loss, "fn", loss) in _LOSSES_BY_EXAMPLE
        and all(axis is not None and (axis == -1 or axis > 0) for axis in axes)
    )
