"""Parameter sets of which every run tries some, and CI all."""

import pytest


def slow_but(values, *fast):
    """Return the values; those which are not in `fast` are marked slow."""
    return [pytest.param(v, marks=[pytest.mark.slow] * (v not in fast)) for v in values]


def with_slow(values, *slow):
    """Return the values; those in `slow` are marked so."""
    return [pytest.param(v, marks=[pytest.mark.slow] * (v in slow)) for v in values]
