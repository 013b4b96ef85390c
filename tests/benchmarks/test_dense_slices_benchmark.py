import pathlib
import sys

import keras
import numpy as np
from frameworks import BACKEND, numpy

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import dense_slices  # noqa: E402
import models as networks  # noqa: E402

from keras_infomcr.regularizers.dense_slices import dense_layers  # noqa: E402


def small(num_classes=10):
    inputs = keras.Input((3, 3, 1))
    x = keras.layers.Dense(5, "tanh")(keras.layers.Flatten()(inputs))
    return inputs, keras.layers.Dense(num_classes)(x)


def test_both_ways_take_the_same_step(float64, rng, monkeypatch):
    """Each moves the weights by 0.01 or so, and rounds gradients of order one by 1e-16."""
    monkeypatch.setitem(networks.NETWORKS, dense_slices.NETWORK, small)
    x, y = rng.normal(size=(7, 3, 3, 1)), rng.integers(10, size=7)
    models, steps = dense_slices.steps_of(x, y, count=3, run_eagerly=BACKEND == "tensorflow")
    assert dense_layers(models[dense_slices.AT_ONCE])
    for step in steps.values():
        step()
    weights = {
        label: np.concatenate([np.ravel(numpy(v)) for v in model.trainable_variables])
        for label, model in models.items()
    }
    plain, at_once, in_turn = weights.values()
    np.testing.assert_allclose(at_once, in_turn, rtol=0, atol=1e-14)
    assert np.max(np.abs(at_once - plain)) > 1e-10
