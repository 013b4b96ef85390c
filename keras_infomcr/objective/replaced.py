"""Attributes of layers, replaced for a time."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(layer: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a layer, past Keras's tracking, in a context."""
    # Keras's own setting of attributes would track the value, as if it were a part of the layer.
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
