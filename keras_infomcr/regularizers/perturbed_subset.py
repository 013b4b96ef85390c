"""Perturb some of the sub-batches, drawn at random for each step."""

from collections.abc import Callable
from typing import Any

import keras

from keras_infomcr import backend
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.sub_batch_averages import Contribution


def random_ranks(generator: keras.random.SeedGenerator, count: int, step: Any) -> Any:
    """Return the numbers below `count` in an order that the number of the step determines.

    Args:
        generator: A `keras.random.SeedGenerator`, made outside of what is traced. It is not moved.
        count: Integer.
        step: Integer scalar array, the optimizer's count of steps, by which a resumed run draws
            as one that was not interrupted.
    """
    state = generator.state
    seed = keras.ops.stack([keras.ops.cast(n, state.dtype) for n in (0, step)])
    with keras.StatelessScope([(state, seed)]):
        return keras.random.shuffle(keras.ops.arange(count), seed=generator)


def perturbing_subset(
    contribution: Callable[[int, list, Any], Contribution],
    ranks: Any,
    count: int,
    weights: list,
    evaluate: Callable[..., Evaluation] | None,
) -> Callable[[int, list, Any], Contribution]:
    """Return what perturbs the sub-batches of the `count` lowest ranks, and no other.

    Args:
        contribution: Function `(i, state, batch) -> Contribution` of a perturbed sub-batch.
        ranks: Integer array `[M]`.
        count: Integer.
        weights: List of arrays, w.
        evaluate: Function `(weights, state, batch) -> Evaluation` for the other sub-batches, if
            the training gradient needs them; else `None`: nothing is computed of them.

    Returns:
        Function `(i, state, batch) -> Contribution`.
    """
    zeros = [keras.ops.zeros_like(w) for w in weights]
    zero = keras.ops.zeros((), backend.widest_float())

    def chosen(i, state, batch):
        # Both branches return the same structure, as the frameworks ask.
        def perturbed():
            found = contribution(i, state, batch)
            gradient = [z if d is None else d for z, d in zip(zeros, found.gradient)]
            main = list(found.main) if evaluate else completed(found.main.state, state)
            return keras.ops.cast(found.value, zero.dtype), gradient, main

        def unperturbed():
            return zero, zeros, list(evaluate(weights, state, batch)) if evaluate else state

        value, gradient, main = backend.cond(ranks[i] < count, perturbed, unperturbed)
        main = Evaluation(*main) if evaluate else Evaluation(None, [], state=main)
        return Contribution(value, gradient, main)

    return chosen


def completed(new_state: list, state: list) -> list:
    """Return the new state, with the old arrays that have not changed."""
    return [old if new is None else new for new, old in zip(new_state, state)]
