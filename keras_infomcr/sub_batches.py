"""Slices of a batch."""

import keras
from keras import ops

from keras_infomcr import backend


def sub_batches(batch, count, fixed_size=None):
    """Cut a batch into `count` contiguous slices, as `numpy.array_split` does.

    A batch of B < count examples gives B slices of one example; where B is not known while
    tracing, the surplus slices repeat an example with fraction 0.

    Args:
        batch: Structure of dense, ragged or sparse arrays and `None`.
        count: Integer, number of slices.
        fixed_size: Integer, the size of the batch, for models that see no other: each slice is
            tiled to it. `None` for all other models.

    Returns:
        List of `(fraction, slice, rows)`: `fraction` b_i/B, a float or a float64 scalar; `rows`
        the indices of the slice's examples in the batch where it is tiled, else `None`.
    """
    size = fixed_size or backend.batch_size(batch)
    known = isinstance(size, int)
    if known:
        count = min(count, size)
    if fixed_size and size % count:
        raise ValueError(
            "The batch size must be a multiple of `num_sub_batches` where recurrent layers are "
            f"stateful. Received: batch size={size}, num_sub_batches={count}. Change one of them."
        )
    slices = []
    for i in range(count):
        start, length = _bounds(i, size, count)
        if known:
            fraction = length / size
        else:
            fraction = ops.cast(length, "float64") / ops.cast(size, "float64")
            start, length = ops.minimum(start, size - 1), ops.maximum(length, 1)
        rows = start + ops.arange(size) % length if fixed_size else None
        slices.append((fraction, _take(batch, start, length, rows), rows))
    return slices


def _bounds(i, size, count):
    """Return where slice i starts and how long it is, integers or scalar arrays."""
    base, surplus = size // count, size % count
    if isinstance(size, int):
        return i * base + min(i, surplus), base + (i < surplus)
    return i * base + ops.minimum(i, surplus), base + ops.cast(i < surplus, "int32")


def _take(batch, start, length, rows):
    def take(array):
        if array is None:
            return None
        if rows is None:
            return backend.slice_rows(array, start, length)
        return ops.take(array, rows, axis=0)

    return keras.tree.map_structure(take, batch)
