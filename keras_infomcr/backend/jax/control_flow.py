"""JAX: compilation, loops and branches, and rows of arrays.

Keras keeps the mask of an array as an attribute, which loops and branches do not pass on: here
masks travel as results of their own.
"""

import functools
import operator
from collections.abc import Callable

import jax
import keras
import numpy as np
from jax import numpy as jnp
from jax.experimental.sparse import JAXSparse
from jax.extend.core import ClosedJaxpr, Jaxpr

from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask


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


class _NoSlice(Exception):
    """Slices of an unknown length, or of a sparse array, have no shape to trace with."""


def slice_rows(array, start: int | jax.Array, length: int):
    """Return rows of a dense or sparse array."""
    if not is_traced(start):
        return array[start : start + length]
    if is_traced(length) or isinstance(array, JAXSparse):
        raise _NoSlice
    return jax.lax.dynamic_slice_in_dim(array, start, length)


def sum_by_number(rows: jax.Array, numbers: jax.Array, count: int) -> jax.Array:
    """Return the sums of the rows of each number."""
    return jax.ops.segment_sum(rows, numbers, count)


def traced_once(function: Callable) -> Callable:
    """Return the function: XLA would inline it at each place that calls it."""
    return function


def rolled_into_loop(accumulate: Callable, compiled: bool) -> Callable:
    """Return a function like `accumulate` that compiles one step, executed in a loop.

    Eagerly, where a loop would be compiled anew in each call, it is `accumulate`.
    """

    def loop(step, state, count):
        if count == 1 or not is_traced(jnp.zeros(())):
            return accumulate(step, state, count)
        try:
            once, (summands, _, _) = _traced(_with_masks_apart(step), jnp.int32(0), state)
        except _NoSlice:
            return accumulate(step, state, count)

        def body(carry, i):
            sums, state = carry
            summands, outputs, state = once(i, state)
            return (jax.tree.map(jnp.add, sums, summands), state), outputs

        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), summands)
        (sums, _), outputs = jax.lax.scan(body, (sums, state), jnp.arange(count, dtype="int32"))
        steps = (jax.tree.map(operator.itemgetter(i), outputs) for i in range(count))
        return sums, [_with_masks(*step) for step in steps]

    return loop


def cond(predicate: jax.Array, true_function: Callable, false_function: Callable):
    """Call one of two functions."""

    def branch(function):
        def results():
            found = function()
            return found, _masks(found)

        return lambda: _traced(results)[0]()

    return _with_masks(*jax.lax.cond(predicate, branch(true_function), branch(false_function)))


def _with_masks_apart(step):
    def apart(i, state):
        summands, output, state = step(i, state)
        return summands, (output, _masks(output)), state

    return apart


def _masks(results):
    return [get_keras_mask(r) for r in keras.tree.flatten(results)]


def _with_masks(results, masks):
    for result, mask in zip(keras.tree.flatten(results), masks):
        if mask is not None:
            set_keras_mask(result, mask)
    return results


def _traced(function, *args):
    """Return the function, traced, for use in a loop or branch, and the form of what it returns."""
    jaxpr, form = jax.make_jaxpr(function, return_shape=True)(*args)
    fast = _fast_when_nested(jaxpr.jaxpr) if jax.default_backend() == "cpu" else jaxpr.jaxpr

    def traced(*args):
        results = jax.core.eval_jaxpr(fast, jaxpr.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(form), results)

    return traced, form


def _fast_when_nested(jaxpr):
    """Return what has been traced with the axes of all convolutions in the order of Eigen's.

    XLA for CPUs puts the axes in this order in the outermost computation alone. In a loop or branch
    it has loops of its own for convolutions in another order, such as gradients, which take fifty
    times as long.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.replace(jaxpr=_fast_when_nested(jaxpr.jaxpr))
    if isinstance(jaxpr, Jaxpr):
        return jaxpr.replace(eqns=[_fast_equation(e) for e in jaxpr.eqns])
    return tuple(map(_fast_when_nested, jaxpr)) if type(jaxpr) is tuple else jaxpr


def _fast_equation(equation):
    if equation.primitive is not jax.lax.conv_general_dilated_p:
        params = {name: _fast_when_nested(p) for name, p in equation.params.items()}
        return equation.replace(params=params)
    convolution = functools.partial(_convolution, equation.primitive, **equation.params)
    shapes = [variable.aval for variable in equation.invars]
    (call,) = jax.make_jaxpr(jax.jit(convolution))(*shapes).eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars)


def _convolution(primitive, inputs, kernel, *, dimension_numbers, **params):
    """Convolve with the axes batch, space, channels; and space, inputs, outputs of the kernel."""
    batch, channels, *space = dimension_numbers.lhs_spec
    outputs, features, *window = dimension_numbers.rhs_spec
    inputs = jnp.transpose(inputs, (batch, *space, channels))
    kernel = jnp.transpose(kernel, (*window, features, outputs))
    last = len(space) + 1
    of_images, of_kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    numbers = jax.lax.ConvDimensionNumbers(of_images, of_kernel, of_images)
    result = primitive.bind(inputs, kernel, dimension_numbers=numbers, **params)
    batch, channels, *space = dimension_numbers.out_spec
    return jnp.transpose(result, np.argsort((batch, *space, channels)))
