"""Algorithm 1 of InfoMCR: the loss of each sub-batch at w and at w - alpha g."""

import dataclasses
import operator
from typing import Any


@dataclasses.dataclass(frozen=True)
class PairedEvaluations:
    """What the paired evaluations of all sub-batches give.

    Attributes:
        value: R_alpha(w) = sum_i (b_i/B) [L(B_i, w) - L(B_i, w - alpha g_i)], a scalar.
        gradient: Its gradient with g_i held constant, a list like the weights:
            sum_i (b_i/B) [grad L(B_i, w) - grad L(B_i, w - alpha g_i)].
        loss: sum_i (b_i/B) L(B_i, w), a scalar.
        loss_gradient: sum_i (b_i/B) g_i, a list like the weights.
        predictions: The predictions at w, one entry a sub-batch.
        states: The state after the evaluation at w, one entry a sub-batch.
        fractions: The fractions b_i/B.
    """

    value: Any
    gradient: list
    loss: Any
    loss_gradient: list
    predictions: list
    states: list
    fractions: list


def paired_evaluations(
    evaluate, weights, state, sub_batches, alpha, advance=None, multiply=operator.mul
):
    """Evaluate every sub-batch at w and at w - alpha g.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Algorithm 1 (https://arxiv.org/abs/1911.08192).

    Args:
        evaluate: Function `(weights, state, batch) -> (loss, gradients, predictions, new_state)`;
            a gradient is `None` where the loss does not depend on the weight.
        weights: List of arrays, w.
        state: List of arrays that both evaluations of a pair start from.
        sub_batches: Iterable of `(fraction, batch)`, the fractions b_i/B adding up to 1.
        alpha: Float, the step of the finite difference.
        advance: Function `(state, new_state) -> state` that gives the next sub-batch its state.
            Defaults to the same state for all.
        multiply: Function `(scalar, array) -> array`. Defaults to `scalar * array`.

    Returns:
        A `PairedEvaluations`.
    """
    value = loss = 0.0
    gradient = loss_gradient = [None] * len(weights)
    predictions, states, fractions = [], [], []
    for fraction, batch in sub_batches:
        here, g, prediction, new_state = evaluate(weights, state, batch)
        moved = [w if d is None else w - alpha * d for w, d in zip(weights, g)]
        there, h, _, _ = evaluate(moved, state, batch)
        difference = _add(g, [None if b is None else -b for b in h])
        value = value + multiply(fraction, here - there)
        loss = loss + multiply(fraction, here)
        gradient = _add(gradient, _scale(fraction, difference, multiply))
        loss_gradient = _add(loss_gradient, _scale(fraction, g, multiply))
        predictions.append(prediction)
        states.append(new_state)
        fractions.append(fraction)
        state = state if advance is None else advance(state, new_state)
    return PairedEvaluations(value, gradient, loss, loss_gradient, predictions, states, fractions)


def _scale(fraction, terms, multiply):
    return [None if term is None else multiply(fraction, term) for term in terms]


def _add(totals, terms):
    """Add lists of arrays, `None` counting as zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(totals, terms)]
