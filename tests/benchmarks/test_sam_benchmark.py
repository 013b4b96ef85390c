import pathlib
import sys

import keras
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import sam  # noqa: E402


class Taken:
    """A step that has been taken, given by what it has made of the weights and statistics."""

    def __init__(self, weights, statistics=()):
        self.arrays = [np.array(weights)], [np.array(statistics)]

    def variables(self):
        return self.arrays


START = np.zeros(2), np.array([1.0])


def check(ours, plain, rounding=1e-6):
    true = Taken([1.0, 1.0], [2.0])
    labels = sam.OTHERS[sam.BACKEND]
    steps = {sam.PLAIN: plain, sam.OURS: ours, labels[0]: plain, labels[1]: true}
    return sam.check_equal(steps, START, rounding)


@pytest.fixture(autouse=True)
def some_transcription(monkeypatch):
    monkeypatch.setitem(sam.OTHERS, sam.BACKEND, ("plain", "transcription"))


def test_steps_that_differ_by_rounding_are_equal():
    """1e-4 is less than sqrt(1e-6), the rounding of weights behind kinks."""
    apart = check(Taken([1.0001, 1.0], [2.0]), Taken([1.2, 1.0], [2.0]))
    assert apart == pytest.approx(1e-4 / np.sqrt(2))


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (Taken([1.01, 1.0], [2.0]), Taken([1.2, 1.0], [2.0])),  # other weights
        (Taken([1.0, 1.0], [2.1]), Taken([1.2, 1.0], [2.0])),  # other statistics
        (Taken([1.0, 1.0], [2.0]), Taken([1.0, 1.0], [2.0])),  # nobody takes a step of SAM
    ],
)
def test_times_of_other_computations_are_not_compared(ours, plain):
    with pytest.raises(AssertionError, match="same weights and statistics"):
        check(ours, plain)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="there is no transcription of SAM for TensorFlow",
)
def test_the_transcription_takes_the_step_of_sharpness_aware():
    if keras.backend.backend() == "jax":
        pytest.importorskip("optax", reason="optax is not installed")
    rows = sam.measure("mlp", batch_size=16, rounds=1, seconds=0.0)
    assert [row["step"] for row in rows] == [sam.PLAIN, sam.OURS, *sam.OTHERS[sam.BACKEND]]
