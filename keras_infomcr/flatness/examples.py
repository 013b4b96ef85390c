"""Examples of a data set, as NumPy arrays."""

import keras
import numpy as np


def read_examples(x, y, limit):
    """Read labelled examples from arrays or from batches.

    Args:
        x: Array or structure of arrays `[N, ...]`; or a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or another iterable of batches `(x, y)`.
        y: Array `[N, ...]`, `None` if `x` gives batches.
        limit: Integer. Of an iterable of batches only so many examples are read.

    Returns:
        Tuple `(x, y)` of structures of NumPy arrays with equal first dimensions.

    Raises:
        TypeError: If `x` is no data.
        ValueError: If labels are missing or superfluous, lengths differ, or `x` holds NaN or
            infinity.
    """
    if _gives_batches(x):
        if y is not None:
            raise ValueError(
                "`y` must be `None` where `x` gives batches `(x, y)`. "
                f"Received: x={x!r}, y of type {type(y)}"
            )
        x, y = _read_batches(x, limit)
    if y is None:
        raise ValueError("Labels are needed. Received: y=None. Pass `y`, or batches `(x, y)`.")
    x, y = keras.tree.map_structure(np.asarray, x), keras.tree.map_structure(np.asarray, y)
    _check(x, y)
    return x, y


def _gives_batches(x):
    if isinstance(x, (np.ndarray, list, tuple, dict)) or hasattr(x, "__array__"):
        return False
    if not isinstance(x, keras.utils.PyDataset) and not hasattr(x, "__iter__"):
        raise TypeError(
            "`x` must be an array, a structure of arrays, or an iterable of batches such as "
            f"`tf.data.Dataset`. Received: x={x!r} (of type {type(x)})"
        )
    return True


def _read_batches(batches, limit):
    if isinstance(batches, keras.utils.PyDataset):
        batches = (batches[i] for i in range(batches.num_batches))
    parts, count = [], 0
    for batch in batches:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        parts.append(keras.tree.map_structure(np.asarray, (x, y)))
        first = keras.tree.flatten(parts[-1])[0]
        if not first.ndim:
            raise ValueError(
                "The data must come in batches. Received: an element whose first array has "
                f"shape {first.shape}. Call `.batch(...)` on the data set."
            )
        count += len(first)
        if count >= limit:
            break
    if not parts:
        raise ValueError("The data must not be empty. Received: no batch")
    return keras.tree.map_structure(lambda *a: np.concatenate(a)[:limit], *parts)


def _check(x, y):
    lengths = {len(a) if a.ndim else 0 for a in keras.tree.flatten((x, y))}
    if len(lengths) != 1:
        shapes = keras.tree.map_structure(np.shape, (x, y))
        raise ValueError(
            f"`x` and `y` must hold the same number of examples. Received: shapes {shapes}"
        )
    for array in keras.tree.flatten(x):
        if array.dtype == object:
            raise TypeError(
                "`x` must be dense arrays. Received: an array of Python objects, perhaps ragged "
                "or sparse data. Pad it first."
            )
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            raise ValueError(
                "`x` must be finite. Received: NaN or infinity in example "
                f"{bad[0]} and {len(bad) - 1} others"
            )
