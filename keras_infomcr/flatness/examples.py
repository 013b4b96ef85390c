"""Examples of a data set, as NumPy arrays."""

import itertools

import keras
import numpy as np


def read_examples(x, y, limit):
    """Read labelled examples from arrays or from batches.

    Args:
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`.
        y: Array or structure of arrays `[N, ...]`, `None` if `x` gives batches.
        limit: Integer. Of an iterable of batches only so many examples are read.

    Returns:
        Tuple `(x, y)` of structures of NumPy arrays with equal first dimensions.

    Raises:
        TypeError: If `x` is no data.
        ValueError: If labels are missing or superfluous, lengths differ, or `x` holds NaN or
            infinity.
    """
    if isinstance(x, (np.ndarray, dict)) or hasattr(x, "__array__"):
        batches = None
    elif isinstance(x, (list, tuple)):
        batches = x if y is None else None
    else:
        batches = _batches(x)
        if y is not None:
            raise ValueError(
                "`y` must be `None` where `x` gives batches `(x, y)`. "
                f"Received: x={x!r}, y of type {type(y)}"
            )
    if batches is not None:
        x, y = _read_batches(batches, limit)
    if y is None:
        raise ValueError("Labels are needed. Received: y=None. Pass `y`, or batches `(x, y)`.")
    x, y = keras.tree.map_structure(_to_numpy, (x, y))
    _check(x, y)
    return x, y


def _batches(x):
    if isinstance(x, keras.utils.PyDataset):
        indices = itertools.count() if x.num_batches is None else range(x.num_batches)
        return (x[i] for i in indices)
    if not hasattr(x, "__iter__"):
        raise TypeError(
            "`x` must be an array, a structure of arrays, or an iterable of batches such as "
            f"`tf.data.Dataset`. Received: x={x!r} (of type {type(x)})"
        )
    return x


def _read_batches(batches, limit):
    parts, count = [], 0
    for batch in batches:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            raise ValueError("Labels are needed. Received: batches of x alone. Give `(x, y)`.")
        parts.append(keras.tree.map_structure(_to_numpy, (x, y)))
        scalars = [a for a in keras.tree.flatten(parts[-1]) if not a.ndim and a.dtype != object]
        if scalars:
            raise ValueError(
                "The data must come in batches. Received: an element with an array of shape (). "
                "Call `.batch(...)` on the data set."
            )
        _check_dense(parts[-1])
        count += len(keras.tree.flatten(parts[-1])[0])
        if count >= limit:
            break
    if not parts:
        raise ValueError("The data must not be empty. Received: no batch")
    return keras.tree.map_structure(lambda *a: np.concatenate(a)[:limit], *parts)


def _to_numpy(array):
    try:
        return np.asarray(array)
    except (TypeError, RuntimeError):  # a tensor of torch on a GPU, or one that needs a gradient
        return keras.ops.convert_to_numpy(array)


def _check_dense(arrays):
    if any(array.dtype == object for array in keras.tree.flatten(arrays)):
        raise TypeError(
            "The data must be dense arrays. Received: an array of Python objects, perhaps ragged "
            "or sparse data. Pad it first."
        )


def _check(x, y):
    _check_dense((x, y))
    lengths = {len(a) if a.ndim else 0 for a in keras.tree.flatten((x, y))}
    if len(lengths) != 1:
        shapes = [np.shape(a) for a in keras.tree.flatten((x, y))]
        raise ValueError(
            f"`x` and `y` must hold the same number of examples. Received: shapes {shapes}"
        )
    for array in keras.tree.flatten(x):
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            raise ValueError(
                "`x` must be finite. Received: NaN or infinity in example "
                f"{bad[0]} and {len(bad) - 1} others"
            )
