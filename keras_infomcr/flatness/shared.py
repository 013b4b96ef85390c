"""What is compiled once for many measurements of one model."""

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


def shared(key, make):
    """Return `make()`, or what is kept of it under a key."""
    kept = getattr(_here, "kept", None)
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]
