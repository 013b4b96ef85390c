"""Algorithm 1 on all sub-batches at once, for models whose weights are all in Dense layers.

With A_i the inputs of a Dense layer for the examples of sub-batch i, one a row, and D_i the
gradients of L(B_i, w) by its outputs, A_i^T D_i is the gradient by its kernel. So its outputs at
w - alpha g_i are

    x (W - alpha A_i^T D_i) + b - alpha 1^T D_i = x W + b - alpha (x A_i^T + 1) D_i,

and no weights are formed for a sub-batch. Two passes over the whole batch take all evaluations,
however many sub-batches there are.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.sub_batch_averages import Contribution
from keras_infomcr.keras_internals import calls_of_graph, is_rematerialized
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.objective.replaced import replaced
from keras_infomcr.regularizers import coupling
from keras_infomcr.regularizers.perturbed_subset import completed

# Beyond so many examples a slice, x A_i^T takes longer than the weights of a slice do.
LONGEST = 100


def dense_layers(model: keras.Model) -> list[keras.layers.Dense]:
    """Return the Dense layers that hold all trainable weights of a model; none if others do.

    The model must be known to couple no examples, and must call these layers once, with vectors.
    """
    inputs: dict[keras.Layer, list] = {}
    for call in calls_of_graph(model) or []:
        if not isinstance(call.operation, keras.Layer):  # it may read a weight, too
            return []
        if call.operation.trainable_variables:
            arguments = keras.tree.flatten(call.arguments)
            tensors = [a for a in arguments if isinstance(a, keras.KerasTensor)]
            inputs.setdefault(call.operation, []).extend(tensors)
    held = [id(v) for layer in inputs for v in layer.trainable_variables]
    known = (
        sorted(held) == sorted(id(v) for v in model.trainable_variables)
        and all(map(_is_plain, inputs))
        and all(len(tensors) == 1 for tensors in inputs.values())
        and all(len(x.shape) == 2 and not x.sparse for (x,) in inputs.values())
        # The threads of a `MirroredStrategy` would see each other's replaced calls.
        and backend.num_replicas(model) == 1
        and coupling.couples_no_examples(model)
    )
    return list(inputs) if known else []


def _is_plain(layer):
    """Return whether a layer is Dense and nothing else, and all its weights are trainable."""
    own = 1 + getattr(layer, "use_bias", False)
    return (
        type(layer) is keras.layers.Dense
        and len(layer.trainable_variables) == own
        and "call" not in layer.__dict__
        and not is_rematerialized(layer)
    )


def faster_of(
    at_once: Callable[[], Contribution],
    in_turn: Callable[[], Contribution],
    state: list,
    size: Any,
    count: int,
) -> Contribution:
    """Return what the faster of two ways gives, where the sub-batches may be long.

    Args:
        at_once: Function that takes all sub-batches at once.
        in_turn: Function that takes one after the other.
        state: List of arrays, the state that both start from.
        size: Integer or scalar array, the number of examples.
        count: Integer, the number of sub-batches.
    """
    short = size <= LONGEST * count
    if isinstance(size, int):
        return at_once() if short else in_turn()
    short = ops.logical_and(short, size > 0)  # a batch may be empty, and has no slices then

    def lists(function):
        # Both branches return the same structure, as TensorFlow asks.
        def results():
            found = function()
            main = found.main and [*found.main[:3], completed(found.main.state, state)]
            return ops.cast(found.value, backend.widest_float()), found.gradient, main

        return results

    value, gradient, main = backend.cond(short, lists(at_once), lists(in_turn))
    return Contribution(value, gradient, main and Evaluation(*main))


def finite_difference(
    objective: Objective,
    state: list,
    batch: Batch,
    alpha: float,
    count: int,
    chosen: Any = None,
    with_main: bool = True,
) -> Contribution:
    """Return the mean over the sub-batches of `core.sub_batch_averages.finite_difference`.

    Args:
        objective: An `Objective` of a model that has `dense_layers`.
        state: List of arrays, the state that both evaluations start from.
        batch: A `Batch`.
        alpha: Float, the step of the finite difference.
        count: Integer, the number of sub-batches.
        chosen: Boolean array `[M]`, the sub-batches to perturb; the others count as zero. Defaults
            to all.
        with_main: Boolean, whether the evaluation at w is asked for, too.

    Returns:
        A `Contribution`. Its main evaluation has the predictions of the whole batch.
    """
    layers = dense_layers(objective.model)
    weights = objective.weights()
    slices = _SideBySide(backend.batch_size(batch), count)
    main, inputs, of_outputs = _evaluation_with_taps(objective, layers, weights, state, batch)
    steps = {
        layer: (
            ops.transpose(slices.cut(ops.stop_gradient(x)), (0, 2, 1)),
            -alpha * slices.of_own_means(d, chosen),
        )
        for layer, x, d in zip(layers, inputs, of_outputs)
        if d is not None  # else the loss does not depend on the layer
    }

    def at_moved_weights(layer, x, y):
        if layer not in steps:
            return y
        transposed, step = steps[layer]
        products = ops.matmul(slices.cut(x), transposed)
        if layer.use_bias:
            products = products + 1
        return y + slices.joined(ops.matmul(products, step))

    def loss_of_slices(weights, state, batch):
        with _outputs_replaced(layers, at_moved_weights):
            return objective(weights, state, batch)

    (loss, _), gradients = backend.value_and_grad(loss_of_slices)(weights, state, batch)
    pairs = zip(main.gradients, gradients)
    difference = [None if g is None or h is None else g - h for g, h in pairs]
    return Contribution(main.loss - loss, difference, main if with_main else None)


def _evaluation_with_taps(objective, layers, weights, state, batch):
    """Return the `Evaluation` at w, the inputs of the layers, and the gradients by the outputs."""
    count = len(weights)

    def loss_with_probes(weights_and_probes, state, batch):
        probes, inputs = dict(zip(layers, weights_and_probes[count:])), {}

        def tapped(layer, x, y):
            inputs[layer] = x
            return y + probes[layer]

        with _outputs_replaced(layers, tapped):
            loss, auxiliary = objective(weights_and_probes[:count], state, batch)
        return loss, (*auxiliary, [inputs[layer] for layer in layers])

    size = backend.batch_size(batch)
    probes = [ops.zeros((size, layer.units), layer.compute_dtype) for layer in layers]
    (loss, (predictions, new_state, inputs)), gradients = backend.value_and_grad(loss_with_probes)(
        [*weights, *probes], state, batch
    )
    return Evaluation(loss, gradients[:count], predictions, new_state), inputs, gradients[count:]


class _SideBySide:
    """The slices that `SubBatches` cuts a batch into, side by side as arrays `[M, b, n]`.

    Slices are as long as the longest, b. What stands behind the end of a shorter one is not to
    count.

    Args:
        size: Integer or scalar array, the number of examples.
        count: Integer, the number of slices.
    """

    def __init__(self, size: Any, count: int):
        self._count = min(count, size) if isinstance(size, int) else ops.minimum(count, size)
        self._size = size
        self._equal = isinstance(size, int) and size % self._count == 0
        if self._equal:
            return
        numbers, examples = ops.arange(self._count), ops.arange(size)
        starts, ends = (k * size // self._count for k in (numbers, numbers + 1))
        longest = -(-size // self._count)
        offsets = ops.arange(longest)
        self._lengths = ends - starts
        self._inside = offsets < self._lengths[:, None]
        self._rows = ops.minimum(starts[:, None] + offsets, size - 1)
        # The last slice i that starts at example k or before it: i B / M < k + 1.
        slices = ((examples + 1) * self._count - 1) // size
        self._places = slices * longest + examples - ops.take(starts, slices)

    def cut(self, array: Any) -> Any:
        """Return the rows of a batch, `[B, n]`, as `[M, b, n]`."""
        if self._equal:
            return ops.reshape(array, (self._count, -1, array.shape[-1]))
        return ops.take(array, self._rows, axis=0)

    def joined(self, array: Any) -> Any:
        """Return the rows of all slices as `[B, n]`."""
        rows = ops.reshape(array, (-1, array.shape[-1]))
        return rows if self._equal else ops.take(rows, self._places, axis=0)

    def of_own_means(self, gradients: Any, chosen: Any) -> Any:
        """Return gradients of a mean over the batch as gradients of the means over the slices.

        They are zero behind the end of a slice, and for slices that are not chosen.
        """
        found, factors = self.cut(gradients), self._count
        if not self._equal:
            size, lengths, inside = (
                ops.cast(a, found.dtype) for a in (self._size, self._lengths, self._inside)
            )
            factors = inside[..., None] * (size / lengths)[:, None, None]
        if chosen is not None:
            factors = factors * ops.cast(chosen[: self._count], found.dtype)[:, None, None]
        return factors * found


@contextlib.contextmanager
def _outputs_replaced(layers: list, replacement: Callable) -> Iterator[None]:
    """Have layers apply their activation to what a function `(layer, x, y)` makes of x W + b."""

    def calling(layer, call, activation):
        def replaced_call(x, *args, **kwargs):
            with replaced(layer, "activation", None):
                y = call(x, *args, **kwargs)
            y = replacement(layer, ops.cast(x, y.dtype), y)
            return y if activation is None else activation(y)

        return replaced_call

    with contextlib.ExitStack() as stack:
        for layer in layers:
            call = calling(layer, layer.call, layer.activation)
            stack.enter_context(replaced(layer, "call", call))
        yield
