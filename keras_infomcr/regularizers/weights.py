"""Weights of low precision."""

from collections.abc import Sequence

import keras

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
