"""InfoMCR's regulariser from the sub-batches of a batch, by two estimators."""

import contextlib
import dataclasses
import operator
from typing import Any

from keras_infomcr.core.host_generators import host_generators_kept


@dataclasses.dataclass(frozen=True)
class SubBatchAverages:
    """What the sub-batches of a batch give together, each with its fraction b_i/B.

    All but the first two are `None` where the main pass was not asked for.

    Attributes:
        value: The average of the regulariser, a scalar.
        gradient: The average of its gradient, a list like the weights.
        loss: The average of L(B_i, w), a scalar.
        loss_gradient: The average of g_i = grad L(B_i, w), a list like the weights.
        predictions: The predictions at w, one entry a sub-batch.
        state: The average of the states after the evaluations at w, `None` for what has not
            changed; of what is passed on from sub-batch to sub-batch, what the first has left.
    """

    value: Any
    gradient: list
    loss: Any = None
    loss_gradient: list | None = None
    predictions: tuple | None = None
    state: list | None = None


def finite_differences(evaluate, weights, state, sub_batches, alpha, **kwargs):
    """Evaluate every sub-batch at w and at w - alpha g_i, with g_i held constant.

        value = L(B_i, w) - L(B_i, w - alpha g_i),    gradient = g_i - grad L(B_i, w - alpha g_i)

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Algorithm 1 (https://arxiv.org/abs/1911.08192).

    Args:
        evaluate: Function `(weights, state, batch) -> (loss, gradients, predictions, new_state)`;
            a gradient is `None` where the loss does not depend on the weight, an array of the new
            state where it has not changed.
        weights: List of arrays, w.
        state: List of arrays that both evaluations of a pair start from.
        sub_batches: Sequence of M pairs `(weight, batch)`, the weights M b_i/B.
        alpha: Float, the step of the finite difference.
        **kwargs: As for `average`.

    Returns:
        A `SubBatchAverages`.
    """

    def terms(state, batch):
        with host_generators_kept():  # for the second evaluation to draw the same
            loss, g, predictions, new_state = evaluate(weights, state, batch)
        moved = [w if d is None else w - alpha * d for w, d in zip(weights, g)]
        moved_loss, h, _, _ = evaluate(moved, state, batch)
        difference = [None if a is None or b is None else a - b for a, b in zip(g, h)]
        return loss - moved_loss, difference, loss, g, predictions, new_state

    return average(terms, state, sub_batches, **kwargs)


def hessian_vector_products(evaluate, weights, state, sub_batches, alpha, **kwargs):
    """Take the limit of `finite_differences` as alpha vanishes, to first order in alpha.

        value = alpha ||g_i||^2,    gradient = alpha H_i g_i,    H_i the Hessian of L(B_i, w)

    (With g_i held constant: the gradient of alpha ||g_i||^2 itself is twice as long.)

    Args:
        evaluate: Function `(weights, state, batch) -> (loss, gradients, products, squared_norm,
            predictions, new_state)`, `products` the H_i g_i, `squared_norm` ||g_i||^2.
        weights: As for `finite_differences`.
        state: As for `finite_differences`.
        sub_batches: As for `finite_differences`.
        alpha: As for `finite_differences`.
        **kwargs: As for `average`.

    Returns:
        A `SubBatchAverages`.
    """

    def terms(state, batch):
        loss, g, products, squared_norm, predictions, new_state = evaluate(weights, state, batch)
        curvature = [None if p is None else alpha * p for p in products]
        return alpha * squared_norm, curvature, loss, g, predictions, new_state

    return average(terms, state, sub_batches, **kwargs)


def average(
    terms,
    state,
    sub_batches,
    passed_on=(),
    main_pass=True,
    multiply=operator.mul,
    add_up=None,
    choose=None,
):
    """Average over the sub-batches of a batch.

    Args:
        terms: Function `(state, batch) -> (value, gradient, loss, loss_gradient, predictions,
            new_state)` of one sub-batch.
        state: List of arrays, the state that the first sub-batch starts from.
        sub_batches: Sequence of M pairs `(weight, batch)`, the weights M b_i/B.
        passed_on: Indices of the arrays of the state that each sub-batch takes from the one
            before. All start from the same others.
        main_pass: Boolean, whether more is asked for than the regulariser and its gradient.
        multiply: Function `(scalar, array) -> array`. Defaults to `scalar * array`.
        add_up: Function like `accumulate`. Defaults to that.
        choose: Function `(i, terms, state, batch) -> (value, ...)` that may do something else
            than to call `terms(state, batch)`. Defaults to that.

    Returns:
        A `SubBatchAverages`.
    """
    count = len(sub_batches)

    def weighted(i, passed):
        weight, batch = sub_batches[i]
        current = _replaced(state, passed_on, passed)
        found = choose(i, terms, current, batch) if choose else terms(current, batch)
        value, gradient, loss, loss_gradient, predictions, new_state = found
        left = [current[k] if new_state[k] is None else new_state[k] for k in passed_on]
        summands, output = [value, *gradient], ()
        if main_pass:
            averaged = _replaced(new_state, passed_on, [None] * len(left))
            summands += [loss, *loss_gradient, *averaged]
            output = predictions, left
        if not (isinstance(weight, float) and weight == 1):  # else spare a pass over all weights
            summands = _scale(weight, summands, multiply)
        return summands, output, left

    first = [state[k] for k in passed_on]
    # Beside a main pass that has drawn already, nothing is to be left of what is drawn here.
    with contextlib.nullcontext() if main_pass else host_generators_kept():
        sums, outputs = (add_up or accumulate)(weighted, first, count)
    value, *averages = _scale(1 / count, sums, multiply)
    if not main_pass:
        return SubBatchAverages(value, averages)
    num_weights = (len(averages) - 1 - len(state)) // 2
    gradient, (loss, *rest) = averages[:num_weights], averages[num_weights:]
    predictions, left = zip(*outputs)
    return SubBatchAverages(
        value=value,
        gradient=gradient,
        loss=loss,
        loss_gradient=rest[:num_weights],
        predictions=predictions,
        state=_replaced(rest[num_weights:], passed_on, left[0]),
    )


def accumulate(step, state, count):
    """Take steps, each in the state that the last has left; add up what they give.

    Args:
        step: Function `(i, state) -> (summands, output, next_state)`; the summands are a list of
            arrays and `None`, which counts as zero.
        state: List of arrays, the state of step 0.
        count: Integer, at least 1, the number of steps.

    Returns:
        Tuple of the list of sums and the list of outputs.
    """
    sums, outputs = None, []
    for i in range(count):
        summands, output, state = step(i, state)
        sums = summands if sums is None else _add(sums, summands)
        outputs.append(output)
    return sums, outputs


def _replaced(arrays, indices, values):
    arrays = list(arrays)
    for k, value in zip(indices, values):
        arrays[k] = value
    return arrays


def _scale(scalar, terms, multiply):
    return [None if term is None else multiply(scalar, term) for term in terms]


def _add(totals, terms):
    """Add lists of arrays, `None` counting as zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(totals, terms)]
