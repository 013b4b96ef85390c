"""Measures that check their arguments and then end, without a result."""

import contextlib
import contextvars
from collections.abc import Iterator

_only_checking = contextvars.ContextVar("only_checking", default=False)


class _Checked(Exception):
    """Ends a measure that is to check its arguments alone."""


@contextlib.contextmanager
def only_checking() -> Iterator[None]:
    """Let a measure called in this context end without a result where it begins to compute.

    `FlatnessCallback` asks in this way, before hours of training, whether its measures fit the
    model and the data: each measure knows its own conditions, and says them at the same place as
    when it is called for its result.
    """
    token = _only_checking.set(True)
    try:
        yield
    except _Checked:
        pass
    finally:
        _only_checking.reset(token)


def end_of_checks():
    """Say that a measure has checked what it was given and begins to compute."""
    if _only_checking.get():
        raise _Checked
