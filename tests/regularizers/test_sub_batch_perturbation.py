"""SubBatchPerturbation against a slow reading of Algorithm 1 (InfoMCR), written in NumPy.

Tolerance: everything is float64 and of order one. The difference of two gradients is off by some
1e-15 and multiplied by beta = 10; the contribution that it makes is of order beta * alpha = 0.1.
Relative to it, that is 1e-13 a step, and 1e-10 leaves room for the layers and for three steps.
"""

import keras
import numpy as np
import pytest
from algorithm_1 import (
    MOMENTUM,
    PENALTY,
    RATE,
    Algorithm1,
    SoftmaxRegression,
    TwoLayers,
    assert_same_direction,
    flat,
    make,
)
from frameworks import BACKEND, array
from parameters import with_slow

from keras_infomcr.objective import Batch, Objective


@pytest.fixture
def data(rng):
    """Return 18 examples of five features, their labels in three classes, and their weights."""
    x, y = rng.normal(size=(18, 5)), rng.integers(3, size=18)
    return x, y, rng.uniform(0.2, 3, size=18)


MAIN_GRADIENTS = ["full_batch", "sub_batches", "auto"]
slow = pytest.mark.slow
with_net = pytest.mark.parametrize("net", [SoftmaxRegression, TwoLayers])


@with_net
@pytest.mark.parametrize(("size", "count"), [(8, 4), (7, 3), (2, 3), (5, 1), (3, 3)])
@pytest.mark.parametrize("plainly", [True, False], ids=["", "L2-weighted"])
def test_contribution_is_the_gradient_of_algorithm_1(float64, net, data, size, count, plainly):
    penalty = 0.0 if plainly else PENALTY
    x, y, weights = (a[:size] for a in data)
    model = make(net, penalty, num_sub_batches=count)
    batch = [array(a) for a in (x, y, weights)]
    if plainly:
        weights, batch[2] = np.ones(size), None
    result = model.regularizer(Objective(model), Batch(*batch), [])
    oracle = Algorithm1(net, model.get_weights(), penalty, count)
    value, gradient = oracle.regularizer(x, y, weights)
    assert_same_direction(result.gradient, gradient)
    np.testing.assert_allclose(result.value, value, rtol=1e-10)


@pytest.mark.parametrize("net", [pytest.param(SoftmaxRegression, marks=slow), TwoLayers])
@pytest.mark.parametrize("main", with_slow(MAIN_GRADIENTS, "auto"))
@pytest.mark.parametrize(("size", "count"), [(7, 2), pytest.param(2, 3, marks=slow)])
def test_one_step_is_algorithm_1(float64, net, data, size, count, main):
    x, y, weights = (a[:size] for a in data)
    model = make(net, PENALTY, num_sub_batches=count, main_gradient=main)
    before = model.get_weights()
    oracle = Algorithm1(net, before, PENALTY, count)
    loss, _ = oracle.step(x, y, weights)
    logged = model.train_on_batch(x, y, weights)
    update = [a - b for a, b in zip(model.get_weights(), before)]
    assert_same_direction(update, [a - b for a, b in zip(oracle.parameters, before)])
    np.testing.assert_allclose(logged, loss, rtol=1e-10)


@pytest.mark.parametrize(
    ("net", "main"),
    [
        (TwoLayers, "full_batch"),
        (TwoLayers, "sub_batches"),
        pytest.param(TwoLayers, "auto", marks=slow),
        (SoftmaxRegression, "auto"),
    ],
)
@pytest.mark.parametrize("penalty", [pytest.param(0.0, marks=slow), PENALTY], ids=["", "L2"])
@pytest.mark.parametrize("weighted", [pytest.param(False, marks=slow), True], ids=["", "weighted"])
def test_three_steps_are_algorithm_1(float64, data, net, main, penalty, weighted):
    """Batches of 7, 7 and 1 examples are cut into sub-batches of 3, 4, 3, 4 and 1."""
    x, y, weights = (a[:15] for a in data)
    model = make(net, penalty, num_sub_batches=2, main_gradient=main)
    before = model.get_weights()
    oracle = Algorithm1(net, before, penalty, 2)
    if not weighted:
        weights = np.ones(15)
    batches = [np.arange(15)[s] for s in (slice(0, 7), slice(7, 14), slice(14, 15))]
    losses, values = zip(*(oracle.step(x[i], y[i], weights[i]) for i in batches))
    sample_weight = weights if weighted else None
    history = model.fit(x, y, 7, sample_weight=sample_weight, shuffle=False, verbose=0).history
    update = [a - b for a, b in zip(model.get_weights(), before)]
    assert_same_direction(update, [a - b for a, b in zip(oracle.parameters, before)])
    sizes = [len(i) for i in batches]
    for key, expected in (("loss", losses), ("infomcr_reg", values)):
        np.testing.assert_allclose(history[key], np.average(expected, weights=sizes), rtol=1e-10)


def test_penalties_are_no_part_of_the_regularizer(float64, data):
    results = []
    for penalty in (0.0, 100.0):
        model = make(TwoLayers, penalty, num_sub_batches=2)
        batch = [array(a) for a in data]
        results.append(model.regularizer(Objective(model), Batch(*batch), []))
    # Equal to the bit: the penalties are left out. Had they been subtracted, they would round.
    np.testing.assert_array_equal(flat(results[0].gradient), flat(results[1].gradient))
    np.testing.assert_array_equal(results[0].value, results[1].value)


@pytest.mark.parametrize(
    ("main", "tolerance"), [("full_batch", 0.0), pytest.param("sub_batches", 1e-13, marks=slow)]
)
def test_zero_beta_equals_plain_keras(float64, data, main, tolerance):
    """The full batch agrees to the bit; the mean over sub-batches rounds each step by 1e-16.

    On JAX the full batch rounds too: XLA fuses a pass with what else the step computes.
    """
    tolerance = max(tolerance, 1e-13) if BACKEND == "jax" else tolerance
    x, y, weights = data
    ours = make(TwoLayers, PENALTY, beta=0.0, num_sub_batches=2, main_gradient=main)
    plain = keras.Model(ours.inputs, ours.outputs)
    initial, trained = ours.get_weights(), []
    for model in (ours, plain):
        model.set_weights(initial)
        if model is plain:
            model.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM), ours.loss)
        history = model.fit(x, y, 7, sample_weight=weights, shuffle=False, verbose=0).history
        trained.append([*model.get_weights(), history["loss"]])
    assert_same_direction(*trained, tolerance)
