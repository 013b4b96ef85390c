"""A batch, and its slices."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask


class Batch(NamedTuple):
    """A batch, or a slice of one.

    Attributes:
        x: Inputs, any structure of arrays.
        y: Targets, likewise, or `None`.
        sample_weight: Sample weights, likewise, or `None`.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None


class SubBatches(Sequence):
    """A batch cut into `count` contiguous slices, whose sizes differ by at most one.

    Slice i ends before example (i + 1) B / count, rounded down. If R replicas cut B/R examples each
    into count/R slices, these are the slices that one device makes of the whole batch.

    Item i, an integer or a scalar array, is `(weight, batch)`: its size as a multiple of the
    mean, a float or a scalar of the widest float type, and the slice as a `Batch`.

    A batch of B < count examples gives B slices of one example; where B is not known while
    tracing, the surplus slices repeat an example with weight 0.

    Args:
        batch: A `Batch` of dense, ragged or sparse arrays.
        count: Integer, number of slices.
    """

    def __init__(self, batch: Batch, count: int):
        size = backend.batch_size(batch)
        self._batch = batch
        self._size = size
        self._count = min(count, size) if isinstance(size, int) else count

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        start, length = self._bounds(i)
        if isinstance(length, int):
            weight = length * len(self) / self._size
        else:
            size = ops.maximum(self._size, 1)  # a replica may be left with no example
            dtype = backend.widest_float()
            weight = ops.cast(length * len(self), dtype) / ops.cast(size, dtype)
            start, length = ops.minimum(start, self._size - 1), ops.maximum(length, 1)
        return weight, keras.tree.map_structure(
            lambda a: None if a is None else backend.slice_rows(a, start, length), self._batch
        )

    def __iter__(self) -> Iterator[tuple]:
        return map(self.__getitem__, range(len(self)))

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


def joined(parts: Sequence, size: Any) -> Any:
    """Return the predictions of a batch from the predictions of its slices.

    Args:
        parts: Sequence of structures of arrays, a slice each.
        size: Integer or scalar array, the number of examples in the batch: surplus slices, which
            stand last, are left out.
    """
    return keras.tree.map_structure(lambda *arrays: _concatenated(arrays, size), *parts)


def _concatenated(parts, size):
    whole = ops.concatenate(parts, axis=0)[:size]
    masks = [get_keras_mask(part) for part in parts]
    if all(mask is not None for mask in masks):
        set_keras_mask(whole, ops.concatenate(masks, axis=0)[:size])
    return whole
