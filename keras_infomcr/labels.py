"""The labels of sparse cross-entropies.

TensorFlow and torch refuse a class that there is not, each with an error of its own, or fail on a
GPU. JAX takes the example for one without a label.
"""

from typing import Any

import keras
import numpy as np

from keras_infomcr.keras_internals import get_keras_mask
from keras_infomcr.objective import losses_of


def is_sparse(loss: Any) -> bool:
    """Return whether a loss, as given to `compile`, is the sparse categorical cross-entropy."""
    loss = keras.losses.get(loss)
    return keras.losses.sparse_categorical_crossentropy in (loss, getattr(loss, "fn", None))


def check_labels(model: keras.Model, y: Any, outputs: Any = None) -> None:
    """Refuse labels that stand for no class of a sparse cross-entropy.

    The labels of a model with a `compute_loss` of its own, which may change them, are not checked.
    Nor are the labels of masked outputs, which may be anything where the mask is.

    Args:
        model: A compiled `keras.Model`.
        y: Structure of arrays, the labels. A leaf that is not an array is not checked.
        outputs: Structure like the model's outputs whose leaves have a shape, or `None` to take
            `model.outputs`, which Functional and built Sequential models have. The labels of any
            other model are then not checked. Defaults to `None`.

    Raises:
        ValueError: If a label is below 0, NaN, or not below the number of classes, and not the
            `ignore_class` of the loss.
    """
    if type(model).compute_loss is not keras.Model.compute_loss:
        return
    outputs = outputs if outputs is not None else getattr(model, "outputs", None) or []
    names = sorted(outputs) if isinstance(outputs, dict) else getattr(model, "output_names", None)
    outputs = keras.tree.flatten(outputs)
    losses = _by_output(model.loss, names)
    if losses is None and isinstance(model.loss, dict):
        # Its keys name entries of the outputs, as the labels' do; Keras takes them in this order.
        if not isinstance(y, dict) or not set(model.loss) <= set(y):
            return
        losses = [model.loss.get(name) for name in sorted(y)]
    if losses is None:
        losses = losses_of(model)
        losses *= len(outputs) if len(losses) == 1 else 1
    labels = _by_output(y, names) or keras.tree.flatten(y)
    if not len(losses) == len(labels) == len(outputs):
        return  # Keras says what is wrong
    for loss, of_output, output in zip(losses, labels, outputs):
        if is_sparse(loss) and hasattr(of_output, "__array__") and get_keras_mask(output) is None:
            _check(of_output, keras.losses.get(loss), output)


def _by_output(structure, names):
    """Return the entries of a dictionary in the order of the outputs, else `None`."""
    if isinstance(structure, dict) and names and set(structure) <= set(names):
        return [structure.get(name) for name in names]
    return None


def _check(labels, loss, output):
    num_classes = output.shape[getattr(loss, "axis", -1)]
    ignored = getattr(loss, "ignore_class", None)
    labels = labels if isinstance(labels, np.ndarray) else keras.ops.convert_to_numpy(labels)
    if labels.dtype.kind not in "iuf" or not labels.size:
        return
    counted = labels if ignored is None else np.where(labels == ignored, 0, labels)
    low, high = counted.min(), counted.max()
    if low >= 0 and (num_classes is None or high < num_classes):
        return
    if num_classes == 1:
        raise ValueError(
            "The model must give a row of at least 2 class scores an example. "
            f"Received: outputs of shape {tuple(output.shape)}, and y from {low} to {high}"
        )
    last, count = ("K - 1", "K") if num_classes is None else (num_classes - 1, num_classes)
    unless = "" if ignored is None else f", or {ignored}, the `ignore_class` of the loss,"
    raise ValueError(
        f"`y` must hold integers from 0 to {last}{unless} for a sparse categorical cross-entropy "
        f"of {count} classes. Received: y of shape {labels.shape} and dtype {labels.dtype}, from "
        f"{low} to {high}. Let the model have an output for each class, or leave examples out by "
        "the `ignore_class` of `keras.losses.SparseCategoricalCrossentropy`."
    )
