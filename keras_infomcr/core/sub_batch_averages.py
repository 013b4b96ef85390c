"""InfoMCR's regulariser from the sub-batches of a batch, by two estimators."""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.host_generators import host_generators_kept


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one sub-batch adds to the regulariser, or what all add on the average.

    Attributes:
        value: Scalar array, the regulariser.
        gradient: List like the weights, its gradient.
        main: The `Evaluation` at w, or `None` if the training gradient comes from elsewhere.
    """

    value: Any
    gradient: list
    main: Evaluation | None = None


def paired_evaluations(
    evaluate: Callable[..., Evaluation],
    weights: list,
    moved: Callable[[list], list],
    state: list,
    batch: Any,
) -> tuple[Evaluation, Evaluation]:
    """Return the evaluations of a batch at w and at the weights that its gradient leads to.

    Both start from the same state, so that they see the same dropout masks.

    Args:
        evaluate: Function `(weights, state, batch) -> Evaluation`.
        weights: List of arrays, w.
        moved: Function of the gradients at w that returns the other weights.
        state: List of arrays.
        batch: The batch.
    """
    with host_generators_kept():  # so that the second evaluation draws what the first has drawn
        here = evaluate(weights, state, batch)
    return here, evaluate(moved(here.gradients), state, batch)


def plus_multiple(array: Any, factor: float, term: Any) -> Any:
    """Return array + factor * term."""
    return array + factor * term


def finite_difference(
    evaluate: Callable[..., Evaluation],
    weights: list,
    alpha: float,
    plus_multiple: Callable = plus_multiple,
) -> Callable[[int, list, Any], Contribution]:
    """Return the paired evaluations of a sub-batch at w and at w - alpha g_i, g_i held constant.

        value = L(B_i, w) - L(B_i, w - alpha g_i),    gradient = g_i - grad L(B_i, w - alpha g_i)

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Algorithm 1 (https://arxiv.org/abs/1911.08192).

    Args:
        evaluate: Function `(weights, state, batch) -> Evaluation`.
        weights: List of arrays, w.
        alpha: Float, the step of the finite difference.
        plus_multiple: Function `(array, factor, term) -> array + factor * term`. Defaults to that.

    Returns:
        Function `(i, state, batch) -> Contribution` of sub-batch i. Both evaluations start from
        the same state.
    """

    def moved(gradients):
        pairs = zip(weights, gradients)
        return [w if g is None else plus_multiple(w, -alpha, g) for w, g in pairs]

    def contribution(i, state, batch):
        here, there = paired_evaluations(evaluate, weights, moved, state, batch)
        pairs = zip(here.gradients, there.gradients)
        difference = [None if g is None or h is None else g - h for g, h in pairs]
        return Contribution(here.loss - there.loss, difference, here)

    return contribution


def hessian_vector_product(
    evaluate: Callable[..., tuple], weights: list, alpha: float
) -> Callable[[int, list, Any], Contribution]:
    """Return the limit of `finite_difference` as alpha vanishes, to first order in alpha.

        value = alpha ||g_i||^2,    gradient = alpha H_i g_i,    H_i the Hessian of L(B_i, w)

    (With g_i held constant: the gradient of alpha ||g_i||^2 itself is twice as long.)

    Args:
        evaluate: Function `(weights, state, batch) -> (Evaluation, products, squared_norm)`,
            `products` the H_i g_i, `squared_norm` ||g_i||^2.
        weights: As for `finite_difference`.
        alpha: As for `finite_difference`.

    Returns:
        Function `(i, state, batch) -> Contribution` of sub-batch i.
    """

    def contribution(i, state, batch):
        here, products, squared_norm = evaluate(weights, state, batch)
        curvature = [None if p is None else alpha * p for p in products]
        return Contribution(alpha * squared_norm, curvature, here)

    return contribution


def average(
    contribution: Callable[[int, list, Any], Contribution],
    state: list,
    sub_batches: Sequence,
    passed_on: Sequence[int] = (),
    with_main: bool = True,
    multiply: Callable = operator.mul,
    add_up: Callable | None = None,
) -> Contribution:
    """Average over the sub-batches of a batch.

    Args:
        contribution: Function `(i, state, batch) -> Contribution` of sub-batch i.
        state: List of arrays, the state that the first sub-batch starts from.
        sub_batches: Sequence of M pairs `(weight, batch)`, the weights M b_i/B.
        passed_on: Indices of the arrays of the state that each sub-batch takes from the one
            before. All start from the same others.
        with_main: Boolean, whether the evaluations at w are asked for, too.
        multiply: Function `(scalar, array) -> array`. Defaults to `scalar * array`.
        add_up: Function like `accumulate`. Defaults to that.

    Returns:
        A `Contribution`. Its main evaluation has the mean loss, gradients and state; the
        predictions are a list, one entry a sub-batch, and what is passed on is what the first
        sub-batch has left.
    """
    count = len(sub_batches)

    def weighted(i, passed):
        weight, batch = sub_batches[i]
        current = _replaced(state, passed_on, passed)
        found = contribution(i, current, batch)
        new_state = found.main.state
        left = [current[k] if new_state[k] is None else new_state[k] for k in passed_on]
        summands, output = [found.value, *found.gradient], ()
        if with_main:
            averaged = _replaced(new_state, passed_on, [None] * len(left))
            summands += [found.main.loss, *found.main.gradients, *averaged]
            output = found.main.predictions, left
        if not (isinstance(weight, float) and weight == 1):  # else spare a pass over all weights
            summands = _scale(weight, summands, multiply)
        return summands, output, left

    first = [state[k] for k in passed_on]
    # Beside a main pass that has drawn already, nothing is to be left of what is drawn here.
    with contextlib.nullcontext() if with_main else host_generators_kept():
        sums, outputs = (add_up or accumulate)(weighted, first, count)
    value, *means = _scale(1 / count, sums, multiply)
    if not with_main:
        return Contribution(value, means)
    num_weights = (len(means) - 1 - len(state)) // 2
    gradient, (loss, *rest) = means[:num_weights], means[num_weights:]
    predictions, left = zip(*outputs)
    new_state = _replaced(rest[num_weights:], passed_on, left[0])
    main = Evaluation(loss, rest[:num_weights], list(predictions), new_state)
    return Contribution(value, gradient, main)


def accumulate(step: Callable, state: list, count: int) -> tuple[list, list]:
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
