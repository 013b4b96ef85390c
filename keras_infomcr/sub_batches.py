"""Slices of a batch."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_infomcr import backend


class Batch(NamedTuple):
    """A batch, or a slice of one.

    Attributes:
        x: Inputs, any structure of arrays.
        y: Targets, likewise, or `None`.
        sample_weight: Sample weights, likewise, or `None`.
        rows: Indices of the examples in the batch that this is a tiled slice of, else `None`.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    rows: Any = None


class SubBatches:
    """A batch cut into `count` contiguous slices, as `numpy.array_split` does.

    Item i, an integer or a scalar array, is `(weight, batch)`: its size as a multiple of the
    mean, a float or a float64 scalar, and the slice as a `Batch`.

    A batch of B < count examples gives B slices of one example; where B is not known while
    tracing, the surplus slices repeat an example with weight 0.

    Args:
        batch: A `Batch` of dense, ragged or sparse arrays.
        count: Integer, number of slices.
        fixed_size: Integer, the size of the batch, for models that see no other: each slice is
            tiled to it. `None` for all other models.
    """

    def __init__(self, batch, count, fixed_size=None):
        size = fixed_size or backend.batch_size(batch)
        if isinstance(size, int):
            count = min(count, size)
        if fixed_size and size % count:
            raise ValueError(
                "The batch size must be a multiple of `num_sub_batches` where recurrent layers are "
                f"stateful. Received: batch size={size}, num_sub_batches={count}. Change one of "
                "them."
            )
        self._batch = batch
        self._size = size
        self._count = count
        self._fixed_size = fixed_size

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        start, length = self._bounds(i)
        if isinstance(length, int):
            weight = length * len(self) / self._size
        else:
            weight = ops.cast(length * len(self), "float64") / ops.cast(self._size, "float64")
            start, length = ops.minimum(start, self._size - 1), ops.maximum(length, 1)
        rows = start + ops.arange(self._size, dtype="int32") % length if self._fixed_size else None
        return weight, Batch(*_take(self._batch[:3], start, length, rows), rows)

    def _bounds(self, i):
        """Return where slice i starts and how long it is, integers or scalar arrays."""
        base, surplus = self._size // self._count, self._size % self._count
        if isinstance(surplus, int) and surplus == 0:
            return i * base, base
        if isinstance(surplus, int) and isinstance(i, int):
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
