"""Gradients by the rows of a table, of which each example looks up a few."""

from typing import Any, NamedTuple

from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.per_example.gram import gram

# The products of so many bytes in float64 are formed at once.
_BYTES = 2**27


class Lookups(NamedTuple):
    """Sums over positions p: the row r_ip of example i's gradient receives b_ip.

    No array has the size of the table for each example. With b of a row the sum over its lookups,
    the Gram matrix is a sum over rows. Lookups are sorted by their rows. The few rows with many
    lookups are gathered, example by example; lookups of the others meet all that share their row
    within the next `width` of the sorted ones.

    Attributes:
        rows: Array `[N, P]` of integers, the r_ip.
        upstream: Array `[N, P, E]`, the b_ip.
    """

    rows: Any
    upstream: Any

    def plus(self, others: list["Lookups"]) -> "Lookups":
        """Return the sum over several calls."""
        return Lookups(*(ops.concatenate(of_calls, axis=1) for of_calls in zip(self, *others)))

    def gram(self) -> Any:
        """Return the Gram matrix, `[N, N]`, float64."""
        n, p, e = self.upstream.shape
        width = min(n * p, max(16, n // 2))
        order = ops.argsort(ops.reshape(self.rows, (-1,)))
        rows = ops.take(ops.reshape(self.rows, (-1,)), order)
        examples = ops.cast(order, "int32") // p
        upstream = ops.take(ops.reshape(self.upstream, (-1, e)), order, axis=0)
        if width == n * p:
            return _of_neighbours(rows, examples, upstream, n, width)
        starts = ops.concatenate([ops.ones((1,), "bool"), rows[1:] != rows[:-1]])
        runs = ops.cumsum(ops.cast(starts, "int32")) - 1
        lengths = backend.sum_by_number(ops.ones((n * p,), "int32"), runs, n * p)
        often = ops.take(lengths, runs) > width
        few = ops.where(often[:, None], ops.zeros_like(upstream), upstream)
        numbers = ops.cumsum(ops.cast(ops.logical_and(starts, often), "int32")) - 1
        numbers = ops.where(often, numbers, ops.zeros_like(numbers))
        return _of_neighbours(rows, examples, few, n, width) + _of_gathered(
            numbers, examples, upstream - few, n, n * p // (width + 1)
        )


def _of_gathered(numbers: Any, examples: Any, upstream: Any, n: int, count: int) -> Any:
    """Return the Gram matrix by `count` rows, which are formed for each example."""
    places, together = examples * count + numbers, max(1, _BYTES // (8 * n * count))
    total = 0
    for k in range(0, upstream.shape[1], together):
        found = backend.sum_by_number(upstream[:, k : k + together], places, n * count)
        total = total + gram(ops.reshape(found, (n, -1)))
    return total


def _of_neighbours(rows: Any, examples: Any, upstream: Any, n: int, width: int) -> Any:
    """Return the Gram matrix by rows with at most `width` lookups, which follow each other."""
    size = upstream.shape[0]
    num_blocks = -(-size // width)
    # Lookups of nothing fill the last block, and make one more.
    padding = (0, (num_blocks + 1) * width - size)
    with backend.float64_allowed():
        upstream = ops.cast(ops.pad(upstream, [padding, (0, 0)]), "float64")
        blocks = [
            ops.reshape(array, (num_blocks + 1, width, *array.shape[1:]))
            for array in (ops.pad(rows, [padding]), ops.pad(examples, [padding]), upstream)
        ]
        together, total = max(1, _BYTES // (8 * width**2)), 0
        for k in range(0, num_blocks, together):
            here = [array[k : min(k + together, num_blocks)] for array in blocks]
            after = [array[k + 1 : min(k + together, num_blocks) + 1] for array in blocks]
            across = _products(here, after, n)
            total = total + _products(here, here, n) + across + ops.transpose(across)
        return total


def _products(some: list, others: list, n: int) -> Any:
    """Return the sums over lookups of a block and of another, by their examples."""
    (rows, examples, upstream), (other_rows, other_examples, others) = some, others
    products = upstream @ ops.transpose(others, (0, 2, 1))
    same = rows[:, :, None] == other_rows[:, None, :]
    products = ops.where(same, products, ops.zeros_like(products))
    places = examples[:, :, None] * n + other_examples[:, None, :]
    sums = backend.sum_by_number(ops.reshape(products, (-1,)), ops.reshape(places, (-1,)), n * n)
    return ops.reshape(sums, (n, n))
