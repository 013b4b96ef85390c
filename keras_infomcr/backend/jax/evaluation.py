"""JAX: calls of a model at weights that are not the values of its variables."""

import contextlib

import keras


def forward(model: keras.Model, x, **kwargs):
    """Return the outputs of the model's `call`, which Keras's training step calls directly."""
    return model.call(x, **kwargs)


def modules_at_variables(model: keras.Model) -> contextlib.AbstractContextManager:
    """Do nothing: all layers read variables."""
    return contextlib.nullcontext()


def without_rematerialization() -> contextlib.AbstractContextManager:
    """Do nothing: `jax.checkpoint` computes anew from what it has seen."""
    return contextlib.nullcontext()


def functions_may_hide_weights() -> bool:
    """Return `False`: `jax.checkpoint` sees all arrays."""
    return False


def assigns_in_place() -> bool:
    """Return `False`: Keras's step is a function that returns what has been assigned."""
    return False
