"""The global random generators of Python and NumPy, which a layer's call may draw from."""

import contextlib
import random

import numpy as np


@contextlib.contextmanager
def host_generators_kept():
    """Leave Python's and NumPy's global generators as they were found."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
