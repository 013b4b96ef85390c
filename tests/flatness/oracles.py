"""Literal readings of the paper's Eq. 5: Jacobians formed whole, and their singular values."""

import math

import keras
import numpy as np
from frameworks import jacobian
from keras import ops

EPSILON32 = np.finfo("float32").eps


def rows_of_losses(model, x, losses_of, training=False):
    """Return the Jacobian of `losses_of(outputs)`, of shape `[n]`, with respect to the weights."""
    return jacobian(lambda: losses_of(model(x, training=training)), model.trainable_variables)


def ln_xi(rows):
    """Return ln|J J^T|: the sum of the logarithms of the squared singular values."""
    return 2 * np.sum(np.log(np.linalg.svd(rows.astype("float64"), compute_uv=False)))


def log_loss_of(y):
    return lambda logits: ops.sparse_categorical_crossentropy(y, logits, from_logits=True)


def binary_log_loss_of(y):
    y = np.reshape(y, (-1, 1)).astype(keras.config.floatx())
    return lambda logits: ops.binary_crossentropy(y, logits, from_logits=True)[:, 0]


def rounding(rows, epsilon, depth=10):
    """Bound the change of ln|J J^T| when every row is rounded `depth` times.

    d ln|J J^T| = 2 tr(dJ J^+), at most 2 N ||dJ|| / sigma_min for rows of norm 1.
    """
    unit_rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    smallest = np.linalg.svd(unit_rows.astype("float64"), compute_uv=False)[-1]
    return 2 * len(rows) * math.sqrt(len(rows)) * depth * epsilon / smallest
