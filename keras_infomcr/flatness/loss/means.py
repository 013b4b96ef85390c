"""Means over the examples of data, batch by batch, on all devices of a model."""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.objective import HALF_PRECISION


def mean_over_examples(
    function: Callable,
    batches: Iterable[tuple],
    args: tuple,
    devices: Sequence,
    before: Callable,
    after_first: Callable,
) -> list[np.ndarray | None]:
    """Return the mean of a function over the examples of batches, which the devices share.

    Args:
        function: Function `(*args, x, y)` of a batch that returns an array or a sequence of
            arrays and `None`: means over its examples.
        batches: Iterable of batches `(x, y)` of NumPy arrays, read once.
        args: Tuple of structures of arrays.
        devices: The devices, as `backend.devices` returns them.
        before: Function `(batch, args)` that is called before each batch, by one thread at once.
        after_first: Function `(batch, args)` that is called after the first batch of a device.

    Returns:
        List of NumPy arrays, in float32 at least, and `None`.
    """
    remaining, lock = iter(batches), threading.Lock()

    def share(device):
        """Return the sums over the batches that a device gets, and the number of examples."""
        sums, count = None, 0
        while True:
            with lock:
                batch = next(remaining, None)
                if batch is None:
                    return sums, count
                before(batch, args)
            size = len(keras.tree.flatten(batch)[0])
            tensors = keras.tree.map_structure(ops.convert_to_tensor, batch)
            found = backend.on_device(device, function, *args, *tensors)
            found = found if isinstance(found, (list, tuple)) else [found]
            if not count:
                after_first(tensors, args)
            terms = [None if array is None else size * _widened(array) for array in found]
            sums = terms if sums is None else _added(sums, terms)
            count += size

    if len(devices) == 1:
        shares = [share(devices[0])]
    else:
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            shares = list(pool.map(share, devices))
    total = sum(count for _, count in shares)
    # Sums lie on different devices, and are added as NumPy's.
    sums = [[_to_numpy(array) for array in sums] for sums, _ in shares if sums is not None]
    return [None if a is None else a / total for a in functools.reduce(_added, sums)]


def _widened(array):
    # Sums in half precision would stop growing after a few hundred terms.
    half = keras.backend.standardize_dtype(array.dtype) in HALF_PRECISION
    return ops.cast(array, "float32") if half else array


def _added(sums, terms):
    return [b if a is None else a if b is None else a + b for a, b in zip(sums, terms)]


def _to_numpy(array):
    return None if array is None else ops.convert_to_numpy(array)
