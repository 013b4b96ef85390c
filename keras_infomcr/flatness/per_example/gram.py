"""Products of the rows of a matrix with each other."""

from typing import Any

from keras import ops

from keras_infomcr import backend

# Products of so many columns at once stay in the processor's cache, and were the fastest.
_NUM_COLUMNS = 2**13


def gram(rows: Any) -> Any:
    """Return rows rows^T, of shape `[N, N]`, of rows `[N, W]`, computed in float64."""
    with backend.float64_allowed():
        parts = (
            ops.cast(rows[:, k : k + _NUM_COLUMNS], "float64")
            for k in range(0, rows.shape[1], _NUM_COLUMNS)
        )
        return sum(part @ ops.transpose(part) for part in parts)
