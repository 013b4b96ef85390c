"""Products of the rows of a matrix with each other."""

import functools
from typing import Any

from keras import ops

from keras_infomcr import backend

# Products of so many columns at once stay in the processor's cache, and were the fastest.
_NUM_COLUMNS = 2**13
# With more rows than this, products above the diagonal are not computed again below it, which
# saves a third of the time at 800 rows on TensorFlow and torch. With fewer rows, more and smaller
# products took longer on JAX.
_NUM_ROWS = 2**8


def gram(rows: Any) -> Any:
    """Return rows rows^T, of shape `[N, N]`, of rows `[N, W]`, computed in float64."""
    with backend.float64_allowed():
        starts = range(0, rows.shape[0], _NUM_ROWS)
        parts = (
            ops.cast(rows[:, k : k + _NUM_COLUMNS], "float64")
            for k in range(0, rows.shape[1], _NUM_COLUMNS)
        )
        products = ([_strip(part, start) for start in starts] for part in parts)
        strips = functools.reduce(lambda *both: [a + b for a, b in zip(*both)], products)
        return strips[0] if len(strips) == 1 else _completed(strips)


def _completed(strips: list) -> Any:
    """Return the symmetric matrix of which the strips are the rows from the diagonal on."""
    rows = []
    for number, strip in enumerate(strips):
        before = (
            ops.transpose(other[:, k * _NUM_ROWS : (k + 1) * _NUM_ROWS])
            for k, other in zip(range(number, 0, -1), strips)
        )
        rows.append(ops.concatenate([*before, strip], axis=1))
    return ops.concatenate(rows, axis=0)


def _strip(part: Any, start: int) -> Any:
    """Return the products of some rows with themselves and all rows after them."""
    return part[start : start + _NUM_ROWS] @ ops.transpose(part[start:])
