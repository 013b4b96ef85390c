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
    """A batch cut into `count` contiguous slices, whose sizes differ by at most one.

    Of B examples slice i ends before example (i + 1) B / count, rounded down, so that R replicas
    which cut B/R examples into count/R slices each cut the whole as one device does.

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
            size = ops.maximum(self._size, 1)  # a replica may be left with no example
            weight = ops.cast(length * len(self), "float64") / ops.cast(size, "float64")
            start, length = ops.minimum(start, self._size - 1), ops.maximum(length, 1)
        rows = start + ops.arange(self._size, dtype="int32") % length if self._fixed_size else None
        return weight, Batch(*_take(self._batch[:3], start, length, rows), rows)

    def _bounds(self, i):
        """Return where slice i starts and how long it is, integers or scalar arrays."""
        if isinstance(self._size, int):
            if self._size % self._count == 0:
                length = self._size // self._count
                return i * length, length
            start, end = (k * self._size // self._count for k in (i, i + 1))
            return start, end - start
        count = ops.maximum(ops.minimum(self._count, self._size), 1)
        start, end = (ops.minimum(k * self._size // count, self._size) for k in (i, i + 1))
        return start, end - start


def _take(batch, start, length, rows):
    def take(array):
        if array is None:
            return None
        if rows is None:
            return backend.slice_rows(array, start, length)
        return ops.take(array, rows, axis=0)

    return keras.tree.map_structure(take, batch)
