"""torch: operations run one by one as they are called; and rows of tensors.

Private name of torch used here, for which there is no public one: `is_batchedtensor`.
"""

import itertools
from collections.abc import Callable

import keras
import torch


def compiled(function: Callable) -> Callable:
    """Return the function."""
    return function


def delayed_until(array: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the array: operations run in the order in which they are called."""
    return array


def is_traced(array: torch.Tensor) -> bool:
    """Return whether the array stands for numbers that are not known yet, within `vmap`."""
    return torch._C._functorch.is_batchedtensor(array)


def batch_size(batch) -> int:
    """Return the number of examples."""
    return next(a for a in keras.tree.flatten(batch) if a is not None).shape[0]


def slice_rows(array: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Return rows of a tensor."""
    return array[start : start + length]


def sum_by_number(rows: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return the sums of the rows of each number."""
    return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, numbers, rows)


def traced_once(function: Callable) -> Callable:
    """Return the function: nothing is traced."""
    return function


def rolled_into_loop(accumulate: Callable, compiled: bool) -> Callable:
    """Return a function like `accumulate` that adds in place, into memory that stays in caches."""

    def loop(step, state, count):
        sums, outputs = itertools.repeat(None), []
        for i in range(count):
            summands, output, state = step(i, state)
            sums = [_added_in_place(total, term) for total, term in zip(sums, summands)]
            del summands  # whose memory the next step takes
            outputs.append(output)
        return sums, outputs

    return loop


def _added_in_place(total, term):
    if term is None:
        return total
    return term.clone() if total is None else total.add_(term)  # gradients may share memory


def cond(predicate: torch.Tensor, true_function: Callable, false_function: Callable):
    """Call one of two functions."""
    return true_function() if predicate else false_function()


def as_tensor(array) -> torch.Tensor | None:
    """Return an array on the device that Keras computes on."""
    return None if array is None else keras.ops.convert_to_tensor(array)
