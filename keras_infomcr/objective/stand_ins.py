"""Stand-ins: what an attribute of a layer or variable is while an evaluation runs.

`MirroredStrategy` traces one thread a replica and may switch between them in mid-pass, so that
another thread can meet a stand-in. There it must do what the original does.
"""

import contextlib
import threading

_here = threading.local()
_lock = threading.Lock()


class StandIn:
    """Base class of the stand-ins.

    Attributes:
        original: What the attribute was.
        users: Integer, the number of evaluations that run with the stand-in, in all threads.
    """

    original = None
    users = 0


def evaluating():
    """Return whether this thread is inside an evaluation: whether stand-ins are to act."""
    return getattr(_here, "evaluations", 0) > 0


@contextlib.contextmanager
def standing_in(holders, name, make):
    """Replace an attribute of objects for the time of an evaluation.

    Args:
        holders: List of objects.
        name: String, the attribute.
        make: Function of a holder that returns its `StandIn`.
    """
    with _lock:
        for holder in holders:
            if not isinstance(getattr(holder, name), StandIn):
                stand_in = make(holder)
                stand_in.original = getattr(holder, name)
                # Past Keras's tracking of attributes.
                object.__setattr__(holder, name, stand_in)
            getattr(holder, name).users += 1
    _here.evaluations = getattr(_here, "evaluations", 0) + 1
    try:
        yield
    finally:
        _here.evaluations -= 1
        with _lock:
            for holder in holders:
                stand_in = getattr(holder, name)
                stand_in.users -= 1
                if not stand_in.users:
                    object.__setattr__(holder, name, stand_in.original)
