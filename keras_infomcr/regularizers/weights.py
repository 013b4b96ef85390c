"""Lists of weights: their precision, their norm, and vectors cut into arrays like them."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.objective import HALF_PRECISION, float8_scales


def half_precision(variables: Sequence[keras.Variable]) -> list[str]:
    """Return the paths of the variables of half precision."""
    return [v.path for v in variables if v.dtype in HALF_PRECISION]


def refuse_float8(variables: Sequence[keras.Variable]):
    """Refuse layers quantised to float8, among whose weights are scales without a gradient."""
    scales = float8_scales(variables)
    if scales:
        raise ValueError(
            "Layers must not be quantised to float8, where moved weights give the loss at the old "
            f"ones. Received: float8 scales {scales}. Train with float32, mixed_float16 or "
            "mixed_bfloat16, or with `compile(regularizer=None)`."
        )


def norm(arrays: Sequence) -> Any:
    """Return the Euclidean norm of all numbers of a list of arrays and `None`."""
    total = ops.zeros((), backend.widest_float())
    for array in arrays:
        if array is not None:
            array = ops.cast(array, at_least_float32(array))
            length = ops.norm(ops.reshape(array, (-1,)))
            total = total + ops.square(ops.cast(length, total.dtype))
    return ops.sqrt(total)


def at_least_float32(array: Any) -> str:
    """Return the type in which squares of an array's numbers do not vanish."""
    return keras.backend.result_type(array.dtype, "float32")


def cut(vector: Any, weights: Sequence) -> list:
    """Return a vector of as many numbers as the weights have as a list of arrays like them."""
    sizes = [math.prod(w.shape) for w in weights]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parts = [vector[start : start + size] for start, size in zip(starts, sizes)]
    return [ops.reshape(part, w.shape) for part, w in zip(parts, weights)]
