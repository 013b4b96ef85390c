"""The ways to evaluate sub-batches against the package's own average over them, in float64."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy

from keras_infomcr.core.sub_batch_averages import average, finite_difference
from keras_infomcr.objective import Batch, Objective

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import models as networks  # noqa: E402
import paired_evaluations as evaluations  # noqa: E402
import slices_side_by_side as benchmark  # noqa: E402

pytestmark = pytest.mark.skipif(BACKEND == "tensorflow", reason="It measures JAX and torch.")


def small(num_classes=10):
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(2, 3, use_bias=False)(inputs)
    x = keras.layers.Activation("tanh")(keras.layers.BatchNormalization()(x))
    return inputs, keras.layers.Dense(num_classes)(keras.layers.Flatten()(x))


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "mlp", small)


@pytest.fixture
def expected(float64, small_network, rng):
    """Return the model, a batch cut into three, and what the package makes of it."""
    model = networks.make("mlp")
    x, y = array(rng.normal(size=(6, 4, 4, 1))), array(rng.integers(10, size=6))
    objective = Objective(model)
    weights, state = objective.weights(), objective.state()
    contribution = finite_difference(objective.evaluate, weights, evaluations.ALPHA)
    found = average(contribution, state, objective.sub_batches(Batch(x, y), 3))
    return model, [keras.ops.reshape(a, (3, 2, *a.shape[1:])) for a in (x, y)], found


@pytest.mark.parametrize("way", evaluations.VARIANTS)
def test_all_ways_give_the_numbers_of_the_package(expected, way):
    """Gradients of order one round by 1e-16; their difference is 1e-4 times as large, or so."""
    if way == "one loop" and BACKEND != "jax":
        pytest.skip("The loop is a loop of JAX.")
    model, slices, package = expected
    passes = evaluations.Passes(model)
    run = evaluations.compiled(evaluations.VARIANTS[way], passes)
    found = keras.tree.map_structure(numpy, run(*slices))
    np.testing.assert_allclose(found.loss - found.loss_moved, numpy(package.value), rtol=1e-9)
    for g, h, difference, main in zip(
        found.gradient, found.gradient_moved, package.gradient, package.main.gradients
    ):
        np.testing.assert_allclose(g, numpy(main), rtol=0, atol=1e-14)
        scale = np.max(np.abs(numpy(difference)))
        assert scale > 1e-8
        np.testing.assert_allclose(g - h, numpy(difference), rtol=0, atol=1e-9 * scale)
    changed = [s for s in package.main.state if s is not None and "float" in str(s.dtype)]
    moving = [numpy(s) for s in changed if s.ndim]
    for state, mean in zip(found.state, moving):
        np.testing.assert_allclose(state, mean, rtol=1e-14)
    assert len(found.state) == 2


def test_what_fails_has_a_row(monkeypatch, small_network):
    def failing(passes, x, y):
        raise RuntimeError("out of memory\nand more")

    ways = {"in turn": evaluations.one_by_one, "broken": failing}
    monkeypatch.setattr(evaluations, "VARIANTS", ways)
    good, bad, *on_gpus = benchmark.measure("mlp", 4, 2, rounds=1)
    assert good["difference"] == 0
    assert bad["error"] == "RuntimeError: out of memory"
    assert [row["variant"] for row in on_gpus] == ["in turn, CUDA graph", "in turn, torch.compile"]
    for line in benchmark.table({"versions": "", "rows": [good, bad]}).splitlines()[2:]:
        assert line.count("|") == 7


def test_rows_are_saved(monkeypatch, small_network, tmp_path):
    monkeypatch.setattr(evaluations, "VARIANTS", {})
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--output", str(tmp_path)])
    benchmark.main()
    [path] = tmp_path.glob("slices_side_by_side_*.json")
    assert len(json.loads(path.read_text())["rows"]) == 2
