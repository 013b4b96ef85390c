"""Adaptive sharpness against exact maxima and means of losses that have a closed form.

A worst case is found by ascent: it may fall short of the maximum, but may not exceed it.
"""

import functools
import itertools
import math
import re

import keras
import numpy as np
import pytest
from measuring import Quadratic, assert_untouched, kinds_of_data
from nets import NUM_CLASSES, sequential

from keras_infomcr.flatness import adaptive_sharpness, average_adaptive_sharpness

layers = keras.layers


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def linear(rng, labels=100.0):
    """Return a model whose mean absolute error is linear in its weights, with its slope."""
    model = sequential(layers.Dense(1, bias_initializer="normal"), loss="mae")
    x = rng.normal(size=(12, 6)).astype("float32")
    slope = -np.append(x.mean(axis=0), 1.0) * np.sign(labels)
    weights = np.concatenate([v.ravel() for v in model.get_weights()]).astype("float64")
    return model, x, np.full((12, 1), labels, "float32"), np.abs(weights) * slope


def scaled(quadratic):
    """Return the slope and the Hessian by v of L(w + |w| v)."""
    scale = np.abs(quadratic.weights)
    return scale * quadratic.slope, scale * quadratic.hessian * scale[:, None]


def measured(quadratic, measure=adaptive_sharpness, **settings):
    return measure(quadratic.model, quadratic.x, quadratic.y, **settings)


def maximum_over_ball(slope, hessian, rho):
    """Return max { s v + v H v / 2 : ||v|| <= rho }, H positive semidefinite.

    On the sphere, (lambda - H) v = s with lambda above all eigenvalues; ||v|| falls with lambda.
    """
    eigenvalues, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ slope
    low, high = eigenvalues[-1], eigenvalues[-1] + np.linalg.norm(slope) / rho
    for _ in range(200):
        middle = (low + high) / 2
        too_long = np.linalg.norm(along / (middle - eigenvalues)) > rho
        low, high = (middle, high) if too_long else (low, middle)
    v = along / (high - eigenvalues)
    assert np.linalg.norm(v) == pytest.approx(rho, rel=1e-9)
    return along @ v + v @ (eigenvalues * v) / 2


# ---------------------------------------------------------------- the worst case


@pytest.mark.parametrize("norm", ["l2", "l-inf"])
@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_worst_case_of_a_linear_loss_is_the_dual_norm_of_its_slope(rng, norm, rho):
    model, x, y, slope = linear(rng)
    expected = rho * np.linalg.norm(slope, 2 if norm == "l2" else 1)
    result = adaptive_sharpness(model, x, y, norm=norm, rho=rho, num_steps=1)
    # Losses of 100 are rounded to 1e-5.
    assert result.value == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("rho", [0.05, 0.5, 3.0])
@pytest.mark.parametrize(
    "settings", [{}, {"offset": 1e-3, "fitted": True}], ids=["steep", "fitted"]
)
def test_worst_case_of_a_quadratic_loss_is_that_of_the_trust_region(float64, rng, settings, rho):
    quadratic = Quadratic(rng, **settings)
    exact = maximum_over_ball(*scaled(quadratic), rho)
    values = [measured(quadratic, rho=rho, num_steps=n).value for n in (2, 50)]
    assert values[1] == pytest.approx(exact, rel=1e-2)
    assert 0 <= values[0] <= values[1] <= exact * (1 + 1e-9)


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_worst_case_in_a_box_is_a_corner_of_it(float64, rng, rho):
    """A convex function has its maximum at a corner, where the ascent may find another."""
    quadratic = Quadratic(rng)
    slope, hessian = scaled(quadratic)
    corners = rho * np.array(list(itertools.product([-1, 1], repeat=8)))
    rises = corners @ slope + np.sum(corners @ hessian * corners, axis=1) / 2
    value = measured(quadratic, rho=rho, norm="l-inf").value
    assert 0.9 * rises.max() <= value <= rises.max() * (1 + 1e-9)


def test_worst_case_of_a_loss_that_rises_with_every_weight(float64, rng):
    """With x > 0 and labels of 0 the loss is softplus(w x), largest at w + rho |w|."""
    x = rng.uniform(0.1, 1, size=(12, 6))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = sequential(layers.Dense(1, use_bias=False), loss=loss)
    w = model.get_weights()[0]
    for rho in (0.005, 2.0):
        ends = [np.mean(np.log1p(np.exp(x @ (w + r * np.abs(w))))) for r in (0, rho)]
        result = adaptive_sharpness(model, x, np.zeros(12), rho=rho, norm="l-inf", num_steps=3)
        assert result.value == pytest.approx(ends[1] - ends[0], rel=1e-9)


@pytest.mark.parametrize("norm", ["l2", "l-inf"])
def test_worst_case_inside_of_the_ball(float64, norm):
    """(cos w + 1)^2 is largest at w = 0, which is nearer than the rim."""
    model = sequential(layers.Dense(1, keras.ops.cos, use_bias=False), inputs=(1,), loss="mse")
    model.set_weights([np.array([[0.5]])])
    result = adaptive_sharpness(model, np.ones((1, 1)), -np.ones((1, 1)), rho=1.7, norm=norm)
    # Some 20 steps, halved, end within 1e-2 of w = 0, where the loss is flat.
    assert result.value == pytest.approx(4 - (math.cos(0.5) + 1) ** 2, rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "l-inf"])
def test_weights_of_zero_do_not_move(data, norm):
    model = sequential(layers.Dense(NUM_CLASSES, kernel_initializer="zeros"))
    for measure in (adaptive_sharpness, average_adaptive_sharpness):
        assert measure(model, *data, rho=9.0, norm=norm).value == 0


def test_scaling_a_relu_network_changes_nothing(float64, data):
    """Weights times c before a ReLU and 1 / c after it are the same function, and as sharp."""
    values = []
    for scale in (1.0, 7.0):
        keras.utils.set_random_seed(0)
        stack = layers.Dense(8, "relu", use_bias=False), layers.Dense(NUM_CLASSES, use_bias=False)
        model = sequential(*stack)
        model.set_weights([w * s for w, s in zip(model.get_weights(), (scale, 1 / scale))])
        values.append(adaptive_sharpness(model, *data, num_steps=3, seed=0).value)
        values.append(average_adaptive_sharpness(model, *data, seed=0).value)
    assert values[:2] == pytest.approx(values[2:], rel=1e-9)


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("norm", ["l2", "l-inf"])
@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_average_rise_of_a_quadratic_loss_is_the_trace_of_its_hessian(rng, norm, rho):
    """E[z^T B z] / 2 = rho^2 tr B / 2 for normal z; uniform ones have the variance 1 / 3."""
    quadratic = Quadratic(rng)
    expected = rho**2 * np.trace(scaled(quadratic)[1]) / (2 if norm == "l2" else 6)
    settings = {"rho": rho, "norm": norm, "num_samples": 200, "seed": 0}
    result = measured(quadratic, average_adaptive_sharpness, **settings)
    draw = rng.standard_normal if norm == "l2" else lambda size: rng.uniform(-1, 1, size)
    rises = quadratic.rises(rho * quadratic.weights * draw((10_000, 8)))
    assert abs(rises.mean() - expected) < 4 * rises.std() / math.sqrt(10_000)
    assert abs(result.value - expected) < 4 * rises.std() / math.sqrt(200)


# ---------------------------------------------------------------- batches and draws


def test_batches_are_attacked_each_for_itself(float64, data):
    x, y = data
    model = sequential(layers.Dense(5, "tanh"), layers.Dense(NUM_CLASSES))
    result = adaptive_sharpness(model, x, y, chunk_size=5)
    parts = [slice(0, 5), slice(5, 10), slice(10, 12)]
    alone = [adaptive_sharpness(model, x[rows], y[rows]).value for rows in parts]
    np.testing.assert_allclose(result.samples, alone, rtol=1e-9)
    assert result.value == pytest.approx(np.average(alone, weights=[5, 5, 2]), rel=1e-9)
    assert result.stderr == pytest.approx(np.std(alone, ddof=1) / math.sqrt(3), rel=1e-9)
    whole = adaptive_sharpness(model, x, y)
    assert math.isnan(whole.stderr) and whole.value < result.value


def test_average_is_that_of_all_of_the_data(float64, data):
    model = sequential(layers.Dense(5, "tanh"), layers.Dense(NUM_CLASSES))
    settings = {"num_samples": 4, "seed": 0}
    result, whole = (
        average_adaptive_sharpness(model, *data, chunk_size=c, **settings) for c in (5, 12)
    )
    np.testing.assert_allclose(result.samples, whole.samples, rtol=1e-9, atol=1e-15)
    assert result.stderr == pytest.approx(np.std(whole.samples, ddof=1) / 2, rel=1e-6)


WORST, AVERAGE = (
    functools.partial(adaptive_sharpness, num_steps=2),
    functools.partial(average_adaptive_sharpness, num_samples=2),
)


@kinds_of_data
def test_batches_give_what_arrays_give(data, make):
    model = sequential(layers.Dense(NUM_CLASSES))
    for measure in (WORST, AVERAGE):
        expected = measure(model, *data, chunk_size=5, seed=0).samples
        result = measure(model, make(*data), seed=0).samples
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_draws(float64, data):
    model = sequential(layers.Dense(NUM_CLASSES))

    def values(measure, seeds, **settings):
        return [measure(model, *data, seed=s, **settings).value for s in seeds]

    first, again, other = values(AVERAGE, (0, 0, 1))
    assert first == again != other
    every, shuffled = values(WORST, (0,))[0], values(WORST, (0,), num_examples=12)[0]
    assert every == pytest.approx(shuffled, rel=1e-9)
    assert len(set(values(WORST, (0, 1), num_examples=4))) == 2


# ---------------------------------------------------------------- the rest


def test_weight_penalties_are_no_part_of_the_loss(data):
    penalised = sequential(layers.Dense(NUM_CLASSES, kernel_regularizer=keras.regularizers.L2(9.0)))
    plain = sequential(layers.Dense(NUM_CLASSES))
    plain.set_weights(penalised.get_weights())
    values = [adaptive_sharpness(m, *data, num_steps=2).value for m in (plain, penalised)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("measure", [WORST, AVERAGE])
def test_model_and_seeds_are_untouched(measure):
    assert_untouched(lambda *args: measure(*args, chunk_size=6))


BOTH = [adaptive_sharpness, average_adaptive_sharpness]


@pytest.mark.parametrize(
    ("measures", "arguments", "message"),
    [
        (BOTH, {"norm": "l1"}, "`norm` must be one of 'l2', 'l-inf'. Received: norm='l1'"),
        (BOTH, {"rho": 0.0}, "`rho` must be a finite number greater than 0. Received: rho=0.0"),
        (BOTH[:1], {"num_steps": 0}, "`num_steps` must be an integer of at least 1."),
        (BOTH[1:], {"num_samples": 0}, "`num_samples` must be an integer of at least 1."),
        (BOTH, {"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        (BOTH, {"num_examples": 13}, "`num_examples` must not exceed the number of examples in"),
        (BOTH, {"y": None}, "Labels are needed. Received: y=None."),
        (BOTH, {"x": [], "y": None}, "The data must not be empty. Received: no batch"),
    ],
)
def test_bad_arguments(data, measures, arguments, message):
    model = sequential(layers.Dense(NUM_CLASSES))
    for measure in measures:
        with pytest.raises(ValueError, match=re.escape(message)):
            measure(model, **{"x": data[0], "y": data[1], **arguments})
