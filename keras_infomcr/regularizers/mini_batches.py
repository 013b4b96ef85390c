"""The mini-batches that a batch is cut into, one for each step of a chain that replicas share."""

from typing import Any

from keras import ops

from keras_infomcr import backend
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers.weights import at_least_float32
from keras_infomcr.scalars import times


class MiniBatches:
    """Slices of a batch; with several replicas, mini-batch i is the union of their slices i.

    Item i, an integer or a scalar array, is `(weight, slice)`, that of this replica, as in
    `objective.sub_batches`. Where it is not known while tracing how many examples a batch has, the
    last mini-batches may be empty.

    Args:
        objective: The `Objective`.
        batch: A `Batch`, the share of this replica.
        count: Integer, number of mini-batches.
    """

    def __init__(self, objective: Objective, batch: Batch, count: int):
        self._objective = objective
        self._slices = objective.sub_batches(batch, count)
        self._single = backend.num_replicas(objective.model) == 1
        self._sizes = self._mean_sizes = None
        size = backend.batch_size(batch)
        if not isinstance(size, int):
            weights = ops.stack([self._slices[i][0] for i in range(len(self))])
            self._sizes = weights * ops.cast(size, weights.dtype)
            (self._mean_sizes,) = objective.mean_over_replicas([self._sizes])

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, i: Any) -> tuple[Any, Batch]:
        return self._slices[i]

    def shares_in_running_mean(self, averaging: float) -> Any:
        """Return the share of what each mini-batch gives in a running mean after all of them.

        The mean m <- averaging m + (1 - averaging) x of L terms has the shares
        (1 - averaging) averaging^(L - l). An empty mini-batch has none.
        """
        dtype, filled = backend.widest_float(), len(self)
        if self._sizes is not None:
            filled = ops.sum(ops.cast(self._mean_sizes > 0, dtype))
        later = filled - 1 - ops.arange(len(self), dtype=dtype)
        shares = (1 - averaging) * averaging ** ops.maximum(later, 0)
        return ops.where(later < 0, 0.0, shares)

    def chosen(self, i: Any, new: list, old: list) -> list:
        """Return the new arrays, of which one may be `None`; if mini-batch i is empty, the old."""
        new = [b if a is None else a for a, b in zip(new, old)]
        if self._sizes is None:
            return new
        filled = ops.take(self._mean_sizes, i) > 0
        return [a if a is b else ops.where(filled, a, b) for a, b in zip(new, old)]

    def whole_gradients(self, i: Any, gradients: list, weights: list) -> list:
        """Return the gradients of the mean loss of mini-batch i and of the weight penalties.

        Args:
            i: Integer or scalar array.
            gradients: List of arrays and `None`, those of the mean loss of this replica's slice.
            weights: List of arrays, where they were taken.
        """
        means = self._mean_over_replicas(i, _widened(gradients))
        pairs = zip(means, _widened(self._objective.penalty_gradients(weights)))
        return [p if g is None else g if p is None else g + p for g, p in pairs]

    def _mean_over_replicas(self, i, gradients):
        if self._single:
            return gradients
        if self._sizes is not None:
            share = ops.divide_no_nan(ops.take(self._sizes, i), ops.take(self._mean_sizes, i))
            gradients = [None if g is None else times(share, g) for g in gradients]
        return self._objective.mean_over_replicas(gradients)


def _widened(gradients):
    return [None if g is None else ops.cast(g, at_least_float32(g)) for g in gradients]
