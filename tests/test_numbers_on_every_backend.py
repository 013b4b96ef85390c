"""The same numbers on TensorFlow, JAX and torch, in float32."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from frameworks import BACKEND

SCRIPT = pathlib.Path(__file__).with_name("train_and_measure.py")


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
    """Return a function that runs the script on a backend and returns what it saves."""
    runs = {}

    def run(backend):
        if importlib.util.find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed.")
        if backend not in runs:
            path = tmp_path_factory.mktemp(backend) / "numbers.npz"
            environment = {**os.environ, "KERAS_BACKEND": backend}
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            subprocess.run([sys.executable, SCRIPT, path], check=True, env=environment)
            runs[backend] = dict(np.load(path))
        return runs[backend]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("other", sorted({"tensorflow", "jax", "torch"} - {BACKEND}))
def test_training_and_gamma_hat_give_the_same_numbers(numbers, other):
    """20 steps with batch norm, L2, sample weights and a partial last batch; both estimators.

    1e-5 is 80 roundings of float32; gamma-hat of the same weights, before training, has 8.
    """
    ours, theirs = numbers(BACKEND), numbers(other)
    assert set(ours) == set(theirs) and len(ours) == 14
    for name, value in ours.items():
        tolerance = 1e-6 if name.endswith("before") else 1e-5
        assert np.linalg.norm(value - theirs[name]) <= tolerance * np.linalg.norm(value), name
