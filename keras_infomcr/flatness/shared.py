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
