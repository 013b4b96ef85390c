"""Attributes of layers, replaced for a time."""

import contextlib


@contextlib.contextmanager
def replaced(layer, name, value):
    """Replace an attribute of a layer, past Keras's tracking, in a context."""
    own = name in layer.__dict__
    before = layer.__dict__.get(name)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        if own:
            object.__setattr__(layer, name, before)
        else:
            object.__delattr__(layer, name)
