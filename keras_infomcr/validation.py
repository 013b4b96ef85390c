"""Checks of arguments, each error in Keras's form: what must hold, what was received."""

import math
import numbers

import numpy as np


def positive(**arguments):
    """Require finite numbers greater than zero."""
    _require(arguments, lambda v: _is_finite(v) and v > 0, "a finite number greater than 0")


def non_negative(**arguments):
    """Require finite numbers, zero or greater."""
    _require(arguments, lambda v: _is_finite(v) and v >= 0, "a finite number, 0 or greater")


def number(**arguments):
    """Require numbers other than NaN and infinity; -infinity is one, a logarithm of 0."""
    _require(
        arguments,
        lambda v: _is_finite(v) or (isinstance(v, numbers.Real) and v == -math.inf),
        "a number or -inf",
    )


def fraction(**arguments):
    """Require numbers greater than zero, one at most."""
    _require(arguments, lambda v: _is_finite(v) and 0 < v <= 1, "a number in (0, 1]")


def below_one(**arguments):
    """Require numbers from zero, less than one."""
    _require(arguments, lambda v: _is_finite(v) and 0 <= v < 1, "a number in [0, 1)")


def integer(*, minimum, maximum=math.inf, **arguments):
    """Require integers from `minimum` to `maximum`."""
    limits = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
    _require(
        arguments,
        lambda v: isinstance(v, numbers.Integral) and _is_finite(v) and minimum <= v <= maximum,
        f"an integer {limits}",
    )


def boolean(**arguments):
    """Require `True` or `False`."""
    _require(arguments, _is_bool, "`True` or `False`")


def one_of(*choices, **arguments):
    """Require one of the listed values."""
    # Not of an array, which compares entry by entry.
    _require(
        arguments,
        lambda v: isinstance(v, (str, numbers.Number, np.bool_)) and v in choices,
        f"one of {', '.join(map(repr, choices))}",
    )


def _is_bool(value):
    return isinstance(value, (bool, np.bool_))


def _is_finite(value):
    if not isinstance(value, numbers.Real) or _is_bool(value):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a Python integer that is no float
        return False


def _require(arguments, holds, what):
    for name, value in arguments.items():
        if not holds(value):
            raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
