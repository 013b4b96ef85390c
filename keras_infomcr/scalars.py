"""Scalars of the framework as Python numbers."""

import numbers

import keras


def to_float(scalar):
    """Return a number, scalar array or variable, one of a strategy too, as a float."""
    if isinstance(scalar, numbers.Real):
        return float(scalar)
    # The copy is an array also of a variable, which does not become NumPy's without a warning.
    return float(keras.ops.convert_to_numpy(keras.ops.copy(scalar)))
