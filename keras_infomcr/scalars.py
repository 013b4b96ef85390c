"""Scalars of the framework as Python numbers."""

import keras


def to_float(scalar):
    """Return a scalar array or variable, one of a distribution strategy too, as a float."""
    # The copy is an array also of a variable, which does not become NumPy's without a warning.
    return float(keras.ops.convert_to_numpy(keras.ops.copy(scalar)))
