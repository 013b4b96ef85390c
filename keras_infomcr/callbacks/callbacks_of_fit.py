"""The other callbacks of a `fit`, of which Keras tells a callback nothing."""

import sys

import keras


def callbacks_of_fit(callback):
    """Find the callbacks of the `fit` that is calling a callback, by the calls under way.

    Args:
        callback: A `keras.callbacks.Callback`, in one of its hooks.

    Returns:
        List of all callbacks, in their order, or `None` if it is not known.
    """
    frame = sys._getframe(1)
    while frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            if any(c is callback for c in caller.callbacks):
                return list(caller.callbacks)
        frame = frame.f_back
    return None
