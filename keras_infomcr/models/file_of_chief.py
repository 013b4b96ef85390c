"""Files of a model that several processes train."""

import contextlib
import os
import tempfile

from keras_infomcr import backend


@contextlib.contextmanager
def file_of_chief(model, filepath):
    """Open a context for saving a model, with the path to write to.

    All processes must take part: to read some variables is to sum them over workers. The file of
    the chief is the one to stay, and is complete when any of them goes on.
    """
    if backend.is_chief(model):
        yield filepath
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, os.path.basename(filepath))
    backend.wait_for_workers(model)
