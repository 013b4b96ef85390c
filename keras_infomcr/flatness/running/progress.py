"""The progress of long measurements."""

import contextlib

import keras

from keras_infomcr.keras_internals import steps_shown


@contextlib.contextmanager
def progress_bar(target, verbose):
    """Yield a `keras.utils.Progbar` of passes over data, which ends when the context does."""
    bar = keras.utils.Progbar(target, verbose=verbose, unit_name="pass")
    yield bar
    if verbose:
        bar.update(steps_shown(bar), finalize=True)
