"""Scalars of the framework."""

import numbers

import keras


def to_float(scalar):
    """Return a number, scalar array or variable, one of a strategy too, as a float."""
    return float(scalar if isinstance(scalar, numbers.Real) else _to_numpy(scalar))


def to_shortest_float(scalar):
    """Return the shortest float that rounds to a variable: 0.1 where a float32 holds 0.1."""
    return float(str(_to_numpy(scalar)[()]))


def times(scalar, array):
    """Return scalar * array in the array's dtype."""
    scalar = scalar if isinstance(scalar, float) else keras.ops.cast(scalar, array.dtype)
    return scalar * array


def _to_numpy(scalar):
    # The copy is an array also of a variable, which does not become NumPy's without a warning.
    return keras.ops.convert_to_numpy(keras.ops.copy(scalar))
