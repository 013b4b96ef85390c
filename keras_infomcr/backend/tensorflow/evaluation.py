"""TensorFlow: calls of a model at weights that are not the values of its variables."""

import contextlib

import keras
import tensorflow as tf

from keras_infomcr.backend.tensorflow.differentiation import replaced


def forward(model: keras.Model, x, **kwargs):
    """Return the outputs."""
    return model(x, **kwargs)


def modules_at_variables(model: keras.Model) -> contextlib.AbstractContextManager:
    """Do nothing: all layers read variables."""
    return contextlib.nullcontext()


def without_rematerialization() -> contextlib.AbstractContextManager:
    """Let `tf.recompute_grad` return the function: its gradients see variables alone."""
    return replaced(tf, "recompute_grad", lambda _: lambda function: function)


def functions_may_hide_weights() -> bool:
    """Return `True`: `tf.recompute_grad` sees variables alone."""
    return True


def assigns_in_place() -> bool:
    """Return `True`: there is one value of each variable at a time."""
    return True
