"""What one model's measurements share: what is compiled once, and a check without a result."""

import contextlib
import threading

_here = threading.local()


@contextlib.contextmanager
def sharing(kept):
    """Let the measures taken in this context keep what they compile in a dictionary."""
    before, _here.kept = getattr(_here, "kept", None), kept
    try:
        yield
    finally:
        _here.kept = before


class _Checked(Exception):
    """Ends a measure that is to check its arguments alone."""


@contextlib.contextmanager
def only_checking():
    """Let a measure called in this context end without a result where it begins to compute."""
    _here.only_checking = True
    try:
        yield
    except _Checked:
        pass
    finally:
        _here.only_checking = False


def end_of_checks():
    """Say that a measure has checked what it was given and begins to compute."""
    if getattr(_here, "only_checking", False):
        raise _Checked


def shared(name, make, model, *data):
    """Return `make()`, or what is kept of it by that name for the model, as compiled, and data."""
    kept = getattr(_here, "kept", None)
    if kept is None:
        return make()
    of = model, model.loss, *model.trainable_variables, *data
    key = name, *map(id, of)
    if key not in kept:
        kept[key] = make(), of  # with what is known by its id, which no other object then gets
    return kept[key][0]
