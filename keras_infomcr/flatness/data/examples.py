"""Examples of a data set, as NumPy arrays."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np


def read_examples(x: Any, y: Any, limit: int) -> tuple:
    """Read labelled examples from arrays or from batches.

    Args:
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`.
        y: Array or structure of arrays `[N, ...]`, `None` if `x` gives batches.
        limit: Integer, how many examples of an iterable of batches are read at most.

    Returns:
        Tuple `(x, y)` of structures of NumPy arrays with equal first dimensions.

    Raises:
        TypeError: If `x` is no data.
        ValueError: If labels are missing or superfluous, lengths differ, or the data hold NaN or
            infinity.
    """
    if _gives_batches(x, y):
        return _checked(*_read_batches(_batches(x), limit))
    return _checked(x, y)


def draw_trials(
    size: int, num_examples: int, num_trials: int, seed: int | None
) -> list[np.ndarray]:
    """Draw the examples of trials, none twice until all have been used.

    Args:
        size: Integer, the number of examples in the data.
        num_examples: Integer, at least 1, the examples of a trial.
        num_trials: Integer, at least 1.
        seed: Integer or `None`.

    Returns:
        List of arrays `[num_examples]` of indices.

    Raises:
        ValueError: If the data have fewer examples than a trial.
    """
    if size < num_examples:
        raise ValueError(
            "`num_examples` must not exceed the number of examples in the data. "
            f"Received: num_examples={num_examples}, {size} examples. "
            f"Use `num_examples={size}`, or give more data."
        )
    generator = np.random.default_rng(seed)
    # A pass deals out the examples to as many trials as they suffice for, none twice.
    per_pass = size // num_examples
    passes = [generator.permutation(size) for _ in range(-(-num_trials // per_pass))]
    trials = [
        order[i * num_examples : (i + 1) * num_examples]
        for order in passes
        for i in range(per_pass)
    ]
    return trials[:num_trials]


def num_copies(x: Any) -> int:
    """Return how many examples of a structure of NumPy arrays repeat an earlier one."""
    arrays = keras.tree.flatten(x)
    size = len(arrays[0])
    return size - len({tuple(a[i].tobytes() for a in arrays) for i in range(size)})


def trial_batches(
    x: Any, y: Any, num_examples: int | None, num_trials: int, chunk_size: int, seed: int | None
) -> list["Batches"]:
    """Return the data of each trial.

    Args:
        x: As for `read_examples`.
        y: As for `read_examples`.
        num_examples: Integer, the examples of a trial, or `None`: one trial of all of the data.
        num_trials: Integer, at least 1.
        chunk_size: Integer, at least 1.
        seed: Integer or `None`.

    Returns:
        List of `Batches`.
    """
    if num_examples is None:
        return [Batches(x, y, chunk_size)]
    x, y = read_examples(x, y, limit=num_examples * num_trials)
    size = len(keras.tree.flatten(x)[0])
    return [
        Batches(*keras.tree.map_structure(lambda a, rows=rows: a[rows], (x, y)), chunk_size)
        for rows in draw_trials(size, num_examples, num_trials, seed)
    ]


class Batches:
    """Labelled data in batches, read anew by each iteration.

    Args:
        x: As for `read_examples`; batches must be iterable more than once.
        y: As for `read_examples`.
        chunk_size: Integer, at least 1. Batches that the data come in stay as they are.

    Raises:
        TypeError: As `read_examples`; for batches, when they are read.
        ValueError: As `read_examples`, and if `x` can be read once only.
    """

    def __init__(self, x: Any, y: Any, chunk_size: int):
        self._batches = None
        if _gives_batches(x, y):
            if hasattr(x, "__next__") or _is_endless(x):
                raise ValueError(
                    "The data are read to their end, several times, and must allow it. Received: "
                    f"an iterator or endless data, x={x!r}. Pass a finite data set, or arrays."
                )
            self._batches = x
        else:
            self._x, self._y = _checked(x, y)
            self._chunk_size = chunk_size

    def __iter__(self) -> Iterator[tuple]:
        if self._batches is not None:
            batch = None
            for batch in _batches(self._batches):
                yield _checked(*_to_arrays(batch))
            if batch is None:
                raise ValueError("The data must not be empty. Received: no batch")
            return
        for start in range(0, len(keras.tree.flatten(self._x)[0]), self._chunk_size):
            rows = slice(start, start + self._chunk_size)
            yield keras.tree.map_structure(lambda a: a[rows], (self._x, self._y))  # noqa: B023


def _is_endless(x: Any) -> bool:
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is None
    return hasattr(x, "cardinality") and int(x.cardinality()) == -1  # as tf.data says it


def _gives_batches(x: Any, y: Any) -> bool:
    """Return whether the data are batches `(x, y)`, or raise an error if they are no data."""
    if isinstance(x, (np.ndarray, dict)) or hasattr(x, "__array__"):
        return False
    if isinstance(x, (list, tuple)):
        return y is None
    if not hasattr(x, "__iter__") and not isinstance(x, keras.utils.PyDataset):
        raise TypeError(
            "`x` must be an array, a structure of arrays, or an iterable of batches such as "
            f"`tf.data.Dataset`. Received: x={x!r} (of type {type(x)})"
        )
    if y is not None:
        raise ValueError(
            "`y` must be `None` where `x` gives batches `(x, y)`. "
            f"Received: x={x!r}, y of type {type(y)}"
        )
    return True


def _batches(x: Any) -> Iterator:
    batches = x
    if isinstance(x, keras.utils.PyDataset):
        indices = itertools.count() if x.num_batches is None else range(x.num_batches)
        batches = (x[i] for i in indices)
    with _torch_generator_kept():
        yield from batches


@contextlib.contextmanager
def _torch_generator_kept():
    """Leave the generator as it was that a `DataLoader` draws from, on any backend."""
    torch = sys.modules.get("torch")
    state = torch and torch.get_rng_state()
    try:
        yield
    finally:
        if torch:
            torch.set_rng_state(state)


def _to_arrays(batch):
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    if y is None:
        raise ValueError("Labels are needed. Received: batches of x alone. Give `(x, y)`.")
    arrays = keras.tree.map_structure(_to_numpy, (x, y))
    if any(not a.ndim and a.dtype != object for a in keras.tree.flatten(arrays)):
        raise ValueError(
            "The data must come in batches. Received: an element with an array of shape (). "
            "Call `.batch(...)` on the data set."
        )
    _check_dense(arrays)
    return arrays


def _read_batches(batches, limit):
    parts, count = [], 0
    for batch in batches:
        parts.append(_to_arrays(batch))
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


def _checked(x, y):
    """Return the arrays as NumPy's, of examples that can be measured."""
    if y is None:
        raise ValueError("Labels are needed. Received: y=None. Pass `y`, or batches `(x, y)`.")
    x, y = keras.tree.map_structure(_to_numpy, (x, y))
    _check_dense((x, y))
    lengths = {len(a) if a.ndim else 0 for a in keras.tree.flatten((x, y))}
    if len(lengths) != 1:
        shapes = [np.shape(a) for a in keras.tree.flatten((x, y))]
        raise ValueError(
            f"`x` and `y` must hold the same number of examples. Received: shapes {shapes}"
        )
    if lengths == {0}:
        raise ValueError("The data must not be empty. Received: no example")
    named = [(name, a) for name, data in (("x", x), ("y", y)) for a in keras.tree.flatten(data)]
    for name, array in named:
        # By the extremes, which take no memory of the size of the data.
        if array.dtype.kind == "f" and not np.isfinite([array.min(), array.max()]).all():
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            raise ValueError(
                f"`{name}` must be finite. Received: NaN or infinity in example "
                f"{bad[0]} and {len(bad) - 1} others"
            )
    return x, y
