"""JAX: compilation, branches, and rows of arrays."""

from collections.abc import Callable

import jax
import keras


def compiled(function: Callable) -> Callable:
    """Return the function, compiled by XLA."""
    return jax.jit(function)


def delayed_until(array: jax.Array, other: jax.Array) -> jax.Array:
    """Return the array: XLA puts operations in an order that saves memory."""
    return array


def is_traced(array) -> bool:
    """Return whether the array stands for numbers that are not known yet."""
    return isinstance(array, jax.core.Tracer)


def batch_size(batch) -> int:
    """Return the number of examples."""
    return next(a for a in keras.tree.flatten(batch) if a is not None).shape[0]


def slice_rows(array, start: int, length: int):
    """Return rows of a dense or sparse array."""
    return array[start : start + length]


def sum_by_number(rows: jax.Array, numbers: jax.Array, count: int) -> jax.Array:
    """Return the sums of the rows of each number."""
    return jax.ops.segment_sum(rows, numbers, count)


def traced_once(function: Callable) -> Callable:
    """Return the function: XLA would inline it at each place that calls it."""
    return function


def rolled_into_loop(accumulate: Callable, compiled: bool) -> Callable:
    """Return `accumulate`: XLA's convolutions are slow in loops on CPUs."""
    return accumulate


def cond(predicate: jax.Array, true_function: Callable, false_function: Callable):
    """Call one of two functions."""
    return jax.lax.cond(predicate, true_function, false_function)
