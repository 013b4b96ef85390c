"""The paired evaluations of all sub-batches of a batch, in several ways, on JAX or torch.

A way is a function `(passes, x, y) -> Results` of the slices of a batch, `x[i]` and `y[i]`.
"""

import contextlib
import functools
import warnings
from typing import Any, NamedTuple
from unittest import mock

import keras
from keras import ops
from machine import BACKEND, is_gpu

from keras_infomcr import backend
from keras_infomcr.objective import Batch, Objective

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

    from keras_infomcr.backend.torch.differentiation import _AnyMemoryFormat

ALPHA = 1e-4
REFERENCE = "in turn"


class Skipped(Exception):
    """A variant does not exist here."""


class Passes:
    """The loss of a model as a pure function, in training mode, and its gradients.

    Args:
        model: A compiled `keras.Model`.
    """

    def __init__(self, model):
        self._objective = Objective(model)
        self.weights, self.state = self._objective.weights(), self._objective.state()
        self._numbers = range(len(model.non_trainable_variables))

    def loss(self, weights, x, y):
        """Return the loss and, as auxiliary, what of the state has changed."""
        loss, (_, state) = self._objective(weights, self.state, Batch(x, y))
        return loss, [state[k] for k in self._numbers if state[k] is not None]

    def one(self, weights, x, y):
        """Return `(loss, state), gradients`."""
        (loss, state), gradients = backend.value_and_grad(self.loss)(weights, x, y)
        zeros = map(ops.zeros_like, weights)
        return (loss, state), [z if g is None else g for z, g in zip(zeros, gradients)]

    def side_by_side(self, weights, x, y, weights_of_each=False):
        """Return the same for slices `[M, b, ...]`, with a first axis of M.

        `weights_of_each` says whether the weights have this axis, too.
        """
        axis = 0 if weights_of_each else None
        if BACKEND == "jax":
            return jax.vmap(self.one, in_axes=(axis, 0, 0))(weights, x, y)
        gradient = torch.func.grad_and_value(self.loss, has_aux=True)
        mapped = torch.func.vmap(gradient, in_dims=(axis, 0, 0))
        # The gradients of convolutions that `vmap` takes one after the other come with a warning.
        with _AnyMemoryFormat(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            gradients, found = mapped(weights, x, y)
        return found, gradients


def moved(weights, gradients):
    """Return w - alpha g, for one g or for the g_i of all slices."""
    return [w - ALPHA * g for w, g in zip(weights, gradients)]


class Results(NamedTuple):
    """What the paired evaluations give, of one slice or on the average.

    Attributes:
        loss: Scalar array, L(B_i, w).
        loss_moved: Scalar array, L(B_i, w - alpha g_i).
        gradient: List of arrays, g_i.
        gradient_moved: List of arrays, the gradient at w - alpha g_i.
        state: List of arrays, what of the state the first evaluation has changed.
    """

    loss: Any
    loss_moved: Any
    gradient: list
    gradient_moved: list
    state: list


def results_of(here, there):
    """Return the `Results` of what `Passes.one` gives at w and at w - alpha g_i."""
    (loss, state), gradients = here
    (loss_moved, _), gradients_moved = there
    return Results(loss, loss_moved, gradients, gradients_moved, state)


def means(results):
    """Return the means over the slices, which are the first axis."""
    return keras.tree.map_structure(lambda a: ops.mean(a, axis=0), results)


def divided(results, count):
    """Return sums, divided by the number of slices."""
    return keras.tree.map_structure(lambda a: a / count, results)


def added(results, others):
    """Return sums."""
    return keras.tree.map_structure(lambda a, b: a + b, results, others)


def pair(passes, x, y):
    """Return what the paired evaluations of one slice give."""
    here = passes.one(passes.weights, x, y)
    return results_of(here, passes.one(moved(passes.weights, here[1]), x, y))


def one_by_one(passes, x, y):
    """Evaluate one slice after the other."""
    total = pair(passes, x[0], y[0])
    for i in range(1, len(x)):
        total = added(total, pair(passes, x[i], y[i]))
    return divided(total, len(x))


def in_loop(passes, x, y):
    """Evaluate one slice after the other in a loop that is compiled once."""
    if BACKEND != "jax":
        raise Skipped("a loop of JAX")

    def body(total, slice_):
        return added(total, pair(passes, *slice_)), None

    shapes = jax.eval_shape(lambda: pair(passes, x[0], y[0]))
    zeros = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)
    return divided(jax.lax.scan(body, zeros, (x, y))[0], len(x))


def both_mapped(passes, x, y):
    """Evaluate all slices side by side, in both passes."""
    here = passes.side_by_side(passes.weights, x, y)
    weights = moved(passes.weights, here[1])
    return means(results_of(here, passes.side_by_side(weights, x, y, weights_of_each=True)))


def first_mapped(passes, x, y):
    """Evaluate all slices side by side at w, and then one after the other."""
    (losses, states), gradients = passes.side_by_side(passes.weights, x, y)
    total = None
    for i in range(len(x)):
        weights = moved(passes.weights, [g[i] for g in gradients])
        (loss, _), found = passes.one(weights, x[i], y[i])
        total = added(total, (loss, found)) if total else (loss, found)
    loss_moved, gradients_moved = divided(total, len(x))
    loss, gradients, states = means((losses, gradients, states))
    return Results(loss, loss_moved, gradients, gradients_moved, states)


VARIANTS = {
    REFERENCE: one_by_one,
    "both passes mapped": both_mapped,
    "first pass mapped": first_mapped,
    "one loop": in_loop,
}


def compiled(function, passes):
    """Return the function of `(x, y)`: JAX compiles it, with the weights as its arguments."""
    if BACKEND != "jax":
        return functools.partial(function, passes)

    @jax.jit
    def jitted(weights, state, x, y):
        before = passes.weights, passes.state
        passes.weights, passes.state = weights, state
        try:
            return function(passes, x, y)
        finally:
            passes.weights, passes.state = before

    return lambda x, y: jitted(passes.weights, passes.state, x, y)


def _check_cuda():
    if BACKEND != "torch" or not is_gpu():
        raise Skipped("needs torch on a GPU")


@contextlib.contextmanager
def _all_on_the_device():
    """Let nothing come from the host while operations are recorded.

    Keras copies the numbers of Python to the device, and an evaluation sets the random state, which
    the networks measured here do not need.
    """

    class NumbersMadeThere(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.as_tensor and isinstance(args[0], (bool, int, float)):
                return torch.full((), *args, **kwargs)
            return function(*args, **kwargs or {})

    with (
        mock.patch.object(backend, "random_state", list),
        mock.patch.object(backend, "set_random_state", lambda state: None),
        NumbersMadeThere(),
    ):
        yield


def graphed(passes, x, y):
    """Return a call that replays the evaluations in turn as one CUDA graph."""
    _check_cuda()
    with _all_on_the_device():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is done but once must not be recorded
            one_by_one(passes, x, y)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = one_by_one(passes, x, y)

    def replayed():
        graph.replay()
        return results

    return replayed


def reduced_overhead(passes, x, y):
    """Return a call of what `torch.compile` makes of the evaluations in turn."""
    _check_cuda()
    return functools.partial(torch.compile(one_by_one, mode="reduce-overhead"), passes, x, y)


def calls(passes, x, y):
    """Yield the names of all variants, and functions that return the call to be timed."""
    for name, function in VARIANTS.items():
        yield name, lambda f=function: functools.partial(compiled(f, passes), x, y)
    yield "in turn, CUDA graph", lambda: graphed(passes, x, y)
    yield "in turn, torch.compile", lambda: reduced_overhead(passes, x, y)
