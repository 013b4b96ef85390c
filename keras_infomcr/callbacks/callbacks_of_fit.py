"""The other callbacks of a `fit`, of which Keras tells a callback nothing."""

import sys

import keras


def callback_list_of_fit(callback: keras.callbacks.Callback) -> keras.callbacks.CallbackList | None:
    """Find the `CallbackList` of the `fit` that is calling a callback, by the calls under way.

    Args:
        callback: A `keras.callbacks.Callback`, in one of its hooks.

    Returns:
        The list, or `None` if it is not known.
    """
    frame = sys._getframe(1)
    while frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            if any(c is callback for c in caller.callbacks):
                return caller
        frame = frame.f_back
    return None


def callbacks_of_fit(callback: keras.callbacks.Callback) -> list | None:
    """Return all callbacks of the `fit` that is calling one, in their order, `None` if unknown."""
    found = callback_list_of_fit(callback)
    return None if found is None else list(found.callbacks)
