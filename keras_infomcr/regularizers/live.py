"""Hyper-parameters that may change while a model trains."""

from collections.abc import Callable

import keras
import numpy as np

from keras_infomcr import backend
from keras_infomcr.scalars import to_float


class Live:
    """A hyper-parameter of a regulariser that takes effect with the next batch.

    It is declared in the body of the class. Read, it is a `keras.Variable`, which the training step
    is compiled with; assigned a float, in the constructor or at any time, the variable takes it.

    Args:
        check: Function that is called with the name and the value, as in `check(rho=0.05)`, and
            raises a `ValueError` if the value is out of range.
    """

    def __init__(self, check: Callable):
        self._check = check
        self.name: str | None = None

    def __set_name__(self, owner, name):
        # A subclass may give it a second name, such as `beta = Regularizer.strength`.
        self.name = self.name or name

    def __get__(self, rule, owner=None):
        return self if rule is None else rule.__dict__["_live"][self.name]

    def __set__(self, rule, value):
        value = to_float(value) if hasattr(value, "shape") else value
        self._check(**{self.name: value})
        variables = rule.__dict__.setdefault("_live", {})
        # So wide that float64 weights feel the float that was given.
        value = np.array(value, backend.widest_float())
        if self.name in variables:
            variables[self.name].assign(value)
        else:
            variables[self.name] = keras.Variable(
                value, dtype=value.dtype.name, trainable=False, name=self.name
            )


def live_names(rule: type) -> list[str]:
    """Return all names of the live hyper-parameters of a class of regularisers."""
    return sorted({n for c in rule.__mro__ for n, v in vars(c).items() if isinstance(v, Live)})
