"""Files of a model that several processes train."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras

from keras_infomcr import backend


@contextlib.contextmanager
def file_of_chief(model: keras.Model, filepath: Any) -> Iterator[Any]:
    """Open a context for saving a model, with the path to write to.

    All processes must take part: to read some variables is to sum them over workers. The file of
    the chief is the one to stay, and is complete when any of them goes on.

    Args:
        model: The model.
        filepath: Where to save it. What is not a path is each process's own, and is left to it.
    """
    backend.wait_for_workers(model)  # one may still read the file that is there
    is_path = isinstance(filepath, (str, os.PathLike))
    try:
        if backend.is_chief(model) or not is_path:
            yield filepath
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield os.path.join(folder, pathlib.Path(filepath).name)
    finally:
        backend.wait_for_workers(model)
