"""JAX: derivatives of functions of weights."""

import contextlib
import functools
from collections.abc import Callable

import jax

from keras_infomcr.backend.jax.distribution import without_distribution


def _in_true_float32(function):
    """Let an NVIDIA GPU compute float32 matrix products in float32, not in TensorFloat-32."""

    @functools.wraps(function)
    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return precise


def value_and_grad(function: Callable) -> Callable:
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""
    return without_distribution(_in_true_float32(jax.value_and_grad(function, has_aux=True)))


def value_grad_and_hessian_product(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""

    def gradient_and_value(weights, *args):
        value, gradients = jax.value_and_grad(function, has_aux=True)(weights, *args)
        return gradients, value

    @without_distribution
    @_in_true_float32
    def product(weights, vector, *args):
        # Linearised rather than by `jax.jvp`, which must know the vector before: it may be the
        # gradient itself.
        gradients, product_with, value = jax.linearize(
            lambda w: gradient_and_value(w, *args), weights, has_aux=True
        )
        return value, gradients, product_with(vector or gradients)

    return product


def linearized_gradient(function: Callable) -> Callable:
    """Return `f(weights, *args) -> (gradients, product)`."""

    @without_distribution
    @_in_true_float32
    def linearize(weights, *args):
        return jax.linearize(lambda w: jax.grad(function, has_aux=True)(w, *args)[0], weights)

    return linearize


def curvature_gradient(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> gradients`."""

    @without_distribution
    @_in_true_float32
    def gradient(weights, vector, *args):
        def first_order(weights):
            return jax.grad(function, has_aux=True)(weights, *args)[0]

        def second_order(weights):
            return jax.jvp(first_order, (weights,), (vector,))[1]

        # The second derivative of the gradient along v. Forward mode outside, which also takes
        # functions that have a derivative of their own in reverse mode alone.
        return jax.jvp(second_order, (weights,), (vector,))[1]

    return gradient


def hessian_vector_products(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, vectors, *args) -> products`."""
    jit = jax.jit if compiled else lambda f: f

    @jit
    @without_distribution
    @_in_true_float32
    def linearize(weights, *args):
        return jax.linearize(lambda w: jax.grad(function)(w, *args), weights)[1]

    @jit  # at the precision that was linearised at
    def product(linear, vectors, k):
        return linear([v[k] for v in vectors])

    def products(weights, vectors, *args):
        linear = linearize(weights, *args)
        # Not in a compiled loop: there XLA's convolutions are slow on CPUs.
        found = [product(linear, vectors, k) for k in range(len(vectors[0]))]
        return [jax.numpy.stack(p) for p in zip(*found)]

    return products


def jacobian(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`."""
    jit = jax.jit if compiled else lambda f: f

    @jit
    @_in_true_float32
    def linearize(weights, context, *args):
        return jax.vjp(lambda w: function(w, context, *args), weights)

    @jit  # at the precision that the pullback was made with
    def pull_back(pullback, selector):
        return pullback(selector)[0]

    def jacobian_of_batch(weights, context, *args):
        values, pullback = linearize(weights, context, *args)
        # Not in a compiled loop: there XLA's convolutions are slow on CPUs.
        rows = [pull_back(pullback, one) for one in jax.numpy.eye(len(values), dtype=values.dtype)]
        return values, [jax.numpy.stack(r) for r in zip(*rows)]

    return jacobian_of_batch


def gradients_by_example(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`, mapped over the examples."""
    jit = jax.jit if compiled else lambda f: f

    @jit
    @_in_true_float32
    def gradients_of_examples(weights, context, *args):
        def one(weights, example):
            example = jax.tree.map(lambda a: a[None], example)
            return function(weights, context, *example)[0]

        return jax.vmap(jax.value_and_grad(one), in_axes=(None, 0))(weights, args)

    return gradients_of_examples


def add_to_gradient(gradient: jax.Array, term: jax.Array) -> jax.Array:
    """Return gradient + term."""
    return gradient + term


def has_sparse_gradients() -> bool:
    """Return `False`."""
    return False


def interpolated(start: jax.Array, end: jax.Array, share: jax.Array) -> jax.Array:
    """Return (1 - share) start + share end."""
    share = jax.numpy.asarray(share, start.dtype)
    return (1 - share) * start + share * end


def plus_multiple(array: jax.Array, factor: float, term: jax.Array) -> jax.Array:
    """Return array + factor * term."""
    return array + factor * term


def widest_float() -> str:
    """Return `"float64"` where `jax_enable_x64` is set, else `"float32"`."""
    return "float64" if jax.config.jax_enable_x64 else "float32"


def float64_allowed() -> contextlib.AbstractContextManager:
    """Return a context in which float64 is no longer float32."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()  # where it was before


def low_precision_products() -> bool:
    """Return `False`: the precision is asked for operation by operation."""
    return False
