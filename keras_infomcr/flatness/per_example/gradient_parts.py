"""How the gradients of all examples by a weight are represented, and their Gram matrices.

What a layer gives for a weight is a list of parts, each of which holds the gradients by other
entries of the weight. A layer that is called several times gives such a list for each call, and the
gradients are the sum of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_infomcr.flatness.per_example.gram import gram

# The rows of all examples by a part of a kernel take at most so many bytes in float64. Kernels with
# more entries are taken part by part: a whole Jacobian of a wide layer may not fit into memory.
_ROW_BYTES = 2**28


class Rows(NamedTuple):
    """The gradients themselves.

    Attributes:
        rows: Array `[N, W]`.
    """

    rows: Any

    def plus(self, others: list["Rows"]) -> "Rows":
        """Return the sum over several calls."""
        return Rows(sum((other.rows for other in others), self.rows))

    def gram(self) -> Any:
        """Return the Gram matrix, `[N, N]`, float64."""
        return gram(self.rows)


class Outer(NamedTuple):
    """Sums over positions p of outer products: sum_p a_ip b_ip^T for each of several a.

    Attributes:
        columns: List of arrays `[N, P, I]`, the a_ip of each part of the weight, such as the inputs
            that meet an entry of a convolution's kernel. Several groups of channels, which do not
            meet each other, are an axis before the positions' axis.
        upstream: Array `[N, P, O]`, the b_ip, which all of them have in common.
    """

    columns: list
    upstream: Any

    def plus(self, others: list["Outer"]) -> "Outer":
        """Return the sum over several calls."""
        columns, upstream = zip(self, *others)
        return Outer(
            [ops.concatenate(of_calls, axis=-2) for of_calls in zip(*columns)],
            ops.concatenate(upstream, axis=-2),
        )

    def gram(self) -> Any:
        """Return the Gram matrix, `[N, N]`, float64."""
        columns, upstream = self
        n, *groups, p, o = upstream.shape
        i = columns[0].shape[-1]
        if not groups and p * p * (i + o) <= i * o and 8 * (n * p) ** 2 <= _ROW_BYTES:
            # Few positions: J_i . J_j = sum_pq (a_ip . a_jq) (b_ip . b_jq) takes fewer operations
            # than J, which is not formed.
            of_columns = sum(gram(ops.reshape(c, (n * p, i))) for c in columns)
            products = of_columns * gram(ops.reshape(upstream, (n * p, o)))
            return ops.sum(ops.reshape(products, (n, p, n, p)), (1, 3))
        # J itself, as many input channels of it at a time as fit into the limit.
        width = max(1, _ROW_BYTES // (8 * n * o * math.prod(groups)))
        return sum(
            gram(ops.reshape(ops.swapaxes(c[..., k : k + width], -1, -2) @ upstream, (n, -1)))
            for c in columns
            for k in range(0, i, width)
        )


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        parts_of: Function of a layer, called where its variables have the values of the forward
            pass. It returns a function of the layer's inputs and the gradients by its outputs
            before the activation, which returns for each weight's name a function of no arguments,
            which returns a list of parts.
        weights: Tuple of the names of the weights.
        fits: Function of a built layer: whether it is of this kind, however it was set up.
    """

    parts_of: Callable
    weights: tuple[str, ...]
    fits: Callable[[keras.Layer], bool] = lambda layer: True


def gram_of_calls(calls: list[list]) -> Any:
    """Return the Gram matrix by a weight, `[N, N]`, float64.

    Args:
        calls: List of lists of parts, one for each call of the layer.
    """
    parts = [first.plus(others) if others else first for first, *others in zip(*calls)]
    return sum(part.gram() for part in parts)


def by_position(array: Any) -> Any:
    """Return an array `[N, ..., C]` as `[N, P, C]`."""
    return ops.reshape(array, (array.shape[0], -1, array.shape[-1]))
