"""The paired evaluations of quadratic losses, where everything has a closed form.

L_i(w) = (w - c_i)' A (w - c_i) / 2 has the gradient g_i = A (w - c_i), so that

    L_i(w) - L_i(w - alpha g_i) = alpha g_i'g_i - alpha^2 g_i'A g_i / 2
    grad L_i(w) - grad L_i(w - alpha g_i) = alpha A g_i

All numbers are float64 and of order one; a loss is computed with some 30 additions, so 1e-13 covers
its rounding, and the difference of two losses loses 1/alpha of that.
"""

import dataclasses

import numpy as np
import pytest

from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.sub_batch_averages import accumulate, average, finite_difference

ALPHA = 0.03
FRACTIONS = [0.5, 0.3, 0.2]
DIFFERENCE = {"rtol": 1e-13 / ALPHA}


def finite_differences(evaluate, weights, state, sub_batches, alpha, **kwargs):
    def evaluation(*args):
        return Evaluation(*evaluate(*args))

    contribution = finite_difference(evaluation, weights, alpha)
    return average(contribution, state, sub_batches, **kwargs)


@pytest.fixture
def quadratic(rng):
    factor = rng.normal(size=(5, 5))
    return Quadratic(factor @ factor.T / 5 + np.eye(5), rng.normal(size=(3, 5)))


class Quadratic:
    """The weights are two arrays, `[2]` and `[3]`; a batch is the number of its centre."""

    def __init__(self, hessian, centres):
        self.hessian = hessian
        self.centres = centres
        self.calls = []

    def __call__(self, weights, state, batch):
        self.calls.append((np.concatenate(weights), list(state), batch))
        delta = np.concatenate(weights) - self.centres[batch]
        gradient = self.hessian @ delta
        new_state = [state[0] + 1] if state else []
        return delta @ gradient / 2, [gradient[:2], gradient[2:]], 10 * batch + delta[0], new_state

    def gradients(self, weights):
        return (np.concatenate(weights) - self.centres) @ self.hessian


@pytest.fixture
def weights(rng):
    return [rng.normal(size=2), rng.normal(size=3)]


SUB_BATCHES = list(zip(np.multiply(3, FRACTIONS), range(3)))


def test_value_of_a_quadratic(quadratic, weights):
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    g = quadratic.gradients(weights)
    terms = ALPHA * (g * g).sum(1) - ALPHA**2 / 2 * ((g @ quadratic.hessian) * g).sum(1)
    np.testing.assert_allclose(result.value, FRACTIONS @ terms, **DIFFERENCE)


def test_gradient_of_a_quadratic(quadratic, weights):
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    expected = FRACTIONS @ (ALPHA * quadratic.gradients(weights) @ quadratic.hessian)
    np.testing.assert_allclose(np.concatenate(result.gradient), expected, **DIFFERENCE)
    assert [g.shape for g in result.gradient] == [(2,), (3,)]


def test_gradient_is_the_derivative_of_the_value_at_constant_steps(quadratic, weights):
    steps = ALPHA * quadratic.gradients(weights)

    def value(w):
        def loss(point, i):
            delta = point - quadratic.centres[i]
            return delta @ quadratic.hessian @ delta / 2

        return sum(f * (loss(w, i) - loss(w - steps[i], i)) for i, f in enumerate(FRACTIONS))

    w = np.concatenate(weights)
    # The value is a polynomial of degree two: central differences are exact up to rounding.
    derivative = [(value(w + e) - value(w - e)) / 2 for e in np.eye(5)]
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    np.testing.assert_allclose(np.concatenate(result.gradient), derivative, **DIFFERENCE)


def test_loss_and_its_gradient_are_weighted_means(quadratic, weights):
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    g = quadratic.gradients(weights)
    losses = ((np.concatenate(weights) - quadratic.centres) * g).sum(1) / 2
    np.testing.assert_allclose(result.main.loss, FRACTIONS @ losses, rtol=1e-13)
    np.testing.assert_allclose(np.concatenate(result.main.gradients), FRACTIONS @ g, rtol=1e-13)


def test_value_to_first_order_is_alpha_times_the_mean_squared_gradient(quadratic, weights):
    alpha = 1e-6
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, alpha)
    squares = (quadratic.gradients(weights) ** 2).sum(1)
    # The next term of the series, relative to the first, is alpha times half of A's largest
    # eigenvalue at most; rounding is of the order 1e-15 / alpha.
    bound = alpha * np.linalg.eigvalsh(quadratic.hessian)[-1] / 2 + 1e-8
    np.testing.assert_allclose(result.value / alpha, FRACTIONS @ squares, rtol=bound)


def test_each_sub_batch_is_evaluated_at_w_and_at_w_minus_alpha_g(quadratic, weights):
    finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    w, steps = np.concatenate(weights), ALPHA * quadratic.gradients(weights)
    points = [point for i in range(3) for point in (w, w - steps[i])]
    assert [batch for _, _, batch in quadratic.calls] == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose([call[0] for call in quadratic.calls], points, rtol=1e-14)


def test_weights_and_state_are_left_as_they_were(quadratic, weights):
    before, state = [w.copy() for w in weights], [np.array(7)]
    finite_differences(quadratic, weights, state, SUB_BATCHES, ALPHA, passed_on=[0])
    np.testing.assert_array_equal(np.concatenate(weights), np.concatenate(before))
    assert state == [7]


def test_both_evaluations_of_a_pair_start_from_the_same_state(quadratic, weights):
    def evaluate(ws, state, batch):
        loss, gradients, predictions, (counter,) = quadratic(ws, state[:1], batch)
        return loss, gradients, predictions, [counter, 10.0 * counter + batch]

    state = [1, 0.5]
    result = finite_differences(evaluate, weights, state, SUB_BATCHES, ALPHA, passed_on=[0])
    assert [state for _, state, _ in quadratic.calls] == [[1], [1], [2], [2], [3], [3]]
    # What is passed on is in the end what the first sub-batch left, the rest is averaged.
    counter, average = result.main.state
    assert counter == 2
    np.testing.assert_allclose(average, FRACTIONS @ np.array([20, 31, 42]), rtol=1e-13)


def test_state_is_averaged_by_default(quadratic, weights):
    result = finite_differences(quadratic, weights, [1], SUB_BATCHES, ALPHA)
    assert [state for _, state, _ in quadratic.calls] == [[1]] * 6
    np.testing.assert_allclose(result.main.state, [2], rtol=1e-13)


def test_state_that_does_not_change_is_none(quadratic, weights):
    def evaluate(ws, state, batch):
        loss, gradients, predictions, _ = quadratic(ws, state, batch)
        return loss, gradients, predictions, [None, None]

    result = finite_differences(evaluate, weights, [7, 0.5], SUB_BATCHES, ALPHA, passed_on=[0])
    assert [state for _, state, _ in quadratic.calls] == [[7, 0.5]] * 6
    assert result.main.state == [7, None]


def test_main_pass_is_left_out_on_request(quadratic, weights):
    expected = finite_differences(quadratic, weights, [1], SUB_BATCHES, ALPHA, passed_on=[0])
    calls, quadratic.calls = quadratic.calls, []
    result = finite_differences(
        quadratic, weights, [1], SUB_BATCHES, ALPHA, passed_on=[0], with_main=False
    )
    assert [state for _, state, _ in quadratic.calls] == [state for _, state, _ in calls]
    assert result.value == expected.value
    assert np.array_equal(np.concatenate(result.gradient), np.concatenate(expected.gradient))
    assert result.main is None


def test_predictions_are_those_at_w(quadratic, weights):
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    expected = 10 * np.arange(3) + weights[0][0] - quadratic.centres[:, 0]
    np.testing.assert_allclose(result.main.predictions, expected, rtol=1e-14)


def test_weight_without_gradient_stays_without(quadratic, weights):
    points = []

    def evaluate(ws, state, batch):
        points.append(ws[2])
        loss, gradients, *rest = quadratic(ws[:2], state, batch)
        return loss, [*gradients, None], *rest

    unused = np.ones(4)
    result = finite_differences(evaluate, [*weights, unused], [], SUB_BATCHES, ALPHA)
    assert result.gradient[2] is None and result.main.gradients[2] is None
    assert all(point is unused for point in points)
    expected = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    np.testing.assert_array_equal(result.gradient[1], expected.gradient[1])


def test_weight_that_only_some_sub_batches_reach_keeps_their_share(quadratic, weights):
    def evaluate(ws, state, batch):
        loss, gradients, *rest = quadratic(ws, state, batch)
        return loss, [gradients[0], gradients[1] if batch == 1 else None], *rest

    result = finite_differences(evaluate, weights, [], SUB_BATCHES, ALPHA)
    expected = FRACTIONS[1] * quadratic.gradients(weights)[1][2:]
    np.testing.assert_allclose(result.main.gradients[1], expected, rtol=1e-14)


def test_one_sub_batch_is_the_whole_batch(quadratic, weights):
    result = finite_differences(quadratic, weights, [], [(1.0, 2)], ALPHA)
    expected = ALPHA * quadratic.hessian @ quadratic.gradients(weights)[2]
    np.testing.assert_allclose(np.concatenate(result.gradient), expected, **DIFFERENCE)


def test_fraction_zero_counts_for_nothing(quadratic, weights):
    sub_batches = [(4 * fraction, i) for i, fraction in enumerate(FRACTIONS)] + [(0.0, 0)]
    with_surplus = finite_differences(quadratic, weights, [], sub_batches, ALPHA)
    expected = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    np.testing.assert_allclose(with_surplus.value, expected.value, rtol=1e-14)
    np.testing.assert_allclose(with_surplus.gradient[0], expected.gradient[0], rtol=1e-14)


def test_scalars_are_multiplied_by_the_function_given(quadratic, weights):
    result = finite_differences(
        quadratic,
        weights,
        [],
        SUB_BATCHES,
        ALPHA,
        multiply=lambda scalar, array: 2 * scalar * array,
    )
    expected = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    # Once by the weight, once by 1 / M.
    found, quarters = (
        (r.value, r.main.loss, *r.gradient, *r.main.gradients) for r in (result, expected)
    )
    for got, quarter in zip(found, quarters):
        np.testing.assert_allclose(got, 4 * quarter, rtol=1e-15)


def test_equal_sub_batches_are_averaged(quadratic, weights):
    equal = finite_differences(quadratic, weights, [], [(1.0, i) for i in range(3)], ALPHA)
    g = quadratic.gradients(weights)
    np.testing.assert_allclose(np.concatenate(equal.main.gradients), g.mean(axis=0), rtol=1e-13)


def test_sums_are_added_up_by_the_function_given(quadratic, weights):
    counts = []

    def add_up(step, state, count):
        counts.append(count)
        return accumulate(step, state, count)

    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA, add_up=add_up)
    expected = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    assert counts == [3]
    np.testing.assert_array_equal(result.value, expected.value)


def test_result_is_frozen(quadratic, weights):
    result = finite_differences(quadratic, weights, [], SUB_BATCHES, ALPHA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0
