"""TensorFlow: derivatives of functions of weights."""

import collections
import contextlib
import threading
from collections.abc import Callable

import tensorflow as tf

from keras_infomcr.backend.tensorflow.distribution import outside_of_strategy
from keras_infomcr.backend.tensorflow.random import draws_refused


def value_and_grad(function: Callable) -> Callable:
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""

    def differentiated(weights, *args):
        with outside_of_strategy():
            # What is watched are the weights given: variables that are read are constants here.
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                with draws_refused():
                    value, auxiliary = function(weights, *args)
            gradients = tape.gradient(value, weights)
        return (value, auxiliary), _dense(gradients, weights)

    return differentiated


def value_grad_and_hessian_product(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""
    first_order = value_and_grad(function)

    def product(weights, vector, *args):
        with outside_of_strategy(), _second_derivatives_repaired():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                value, gradients = first_order(weights, *args)
                # The derivative of g . v, with v constant, is H v.
                slope = _dot(gradients, vector or gradients, weights[0].dtype)
            products = tape.gradient(slope, weights)
        return value, gradients, _dense(products, weights)

    return product


def linearized_gradient(function: Callable) -> Callable:
    """Return `f(weights, *args) -> (gradients, product)`."""
    first_order = value_and_grad(function)

    def linearize(weights, *args):
        with outside_of_strategy(), _second_derivatives_repaired():
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(weights)
                _, gradients = first_order(weights, *args)
        known = [k for k, g in enumerate(gradients) if g is not None]

        def product(vector):
            with outside_of_strategy():
                found = [gradients[k] for k in known]
                selectors = [tf.cast(vector[k], gradients[k].dtype) for k in known]
                return _dense(tape.gradient(found, weights, selectors), weights)

        return gradients, product

    return linearize


def curvature_gradient(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> gradients`."""
    second_order = value_grad_and_hessian_product(function)

    def gradient(weights, vector, *args):
        with outside_of_strategy(), _second_derivatives_repaired():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                _, _, products = second_order(weights, vector, *args)
                curvature = _dot(products, vector, weights[0].dtype)
            return _dense(tape.gradient(curvature, weights), weights)

    return gradient


def hessian_vector_products(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, vectors, *args) -> products`."""

    def products(weights, vectors, *args):
        with outside_of_strategy(), _second_derivatives_repaired():
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(weights)
                with tf.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(weights)
                    with draws_refused():
                        value = function(weights, *args)
                gradients = inner.gradient(value, weights)
                known = [k for k, g in enumerate(gradients) if g is not None]
                dense = _dense(gradients, weights)
                gradients = [dense[k] for k in known]

            def product(vector):
                return _gradients(tape, gradients, weights, [vector[k] for k in known])

            return tf.map_fn(product, vectors, fn_output_signature=_specs(weights))

    return tf.function(products, reduce_retracing=True, autograph=False) if compiled else products


def jacobian(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`."""

    def jacobian_of_batch(weights, context, *args):
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(weights)
            with draws_refused():
                values = function(weights, context, *args)
        selectors = tf.eye(tf.shape(values)[0], dtype=values.dtype)
        rows = tf.map_fn(
            lambda selector: _gradients(tape, values, weights, selector),
            selectors,
            fn_output_signature=_specs(weights),
        )
        return values, rows

    return _perhaps_compiled(jacobian_of_batch, compiled)


def gradients_by_example(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`, evaluated example by example."""

    def gradients_of_examples(weights, context, *args):
        def of_one(example):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                example = tf.nest.map_structure(lambda a: a[None], example)
                with draws_refused():
                    value = function(weights, context, *example)[0]
            return value, _gradients(tape, value, weights)

        signature = tf.TensorSpec((), tf.float64), _specs(weights)
        return tf.map_fn(of_one, args, fn_output_signature=signature)

    return _perhaps_compiled(gradients_of_examples, compiled)


def add_to_gradient(gradient, term: tf.Tensor):
    """Return gradient + term; the rows of a sparse gradient stay the same rows."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient + term
    # Rows may repeat (Keras's optimizers depend on how): each repeat takes an equal share.
    indices = tf.cast(gradient.indices, tf.int32)
    ones = tf.ones_like(indices, dtype=term.dtype)
    repeats = tf.gather(tf.math.unsorted_segment_sum(ones, indices, tf.shape(term)[0]), indices)
    share = tf.reshape(repeats, [-1] + [1] * (len(term.shape) - 1))
    values = gradient.values + tf.gather(term, indices) / share
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def has_sparse_gradients() -> bool:
    """Return `True`."""
    return True


def interpolated(start: tf.Tensor, end: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Return (1 - share) start + share end."""
    share = tf.cast(share, start.dtype)
    return (1 - share) * start + share * end


def plus_multiple(array: tf.Tensor, factor: float, term: tf.Tensor) -> tf.Tensor:
    """Return array + factor * term."""
    return array + factor * term


def widest_float() -> str:
    """Return `"float64"`."""
    return "float64"


def float64_allowed() -> contextlib.AbstractContextManager:
    """Do nothing: arrays of float64 can always be made."""
    return contextlib.nullcontext()


def low_precision_products() -> bool:
    """Return whether a GPU here computes float32 matrix products in TensorFloat-32."""
    if not tf.config.experimental.tensor_float_32_execution_enabled():
        return False
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    # GPUs have it from this capability (the architecture called Ampere) on.
    return any(d.get("compute_capability", (0, 0)) >= (8, 0) for d in details)


def _perhaps_compiled(function, compiled):
    return tf.function(function, reduce_retracing=True, autograph=False) if compiled else function


def _dot(arrays, constants, dtype):
    """Return the scalar product of lists of arrays and `None`, the second held constant."""
    dot = tf.zeros((), dtype)
    for a, c in zip(arrays, constants):
        if a is not None:
            dot += tf.cast(tf.reduce_sum(a * tf.stop_gradient(c)), dtype)
    return dot


def _gradients(tape, value, weights, selector=None):
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(value, weights, selector, unconnected_gradients=zero)
    return _dense(gradients, weights)


def _specs(weights):
    return [tf.TensorSpec(w.shape, w.dtype) for w in weights]


def _dense(gradients, weights):
    """Return gradients as tensors of the weights' shapes, which tracing may have lost."""
    return [
        None if g is None else tf.ensure_shape(tf.convert_to_tensor(g), w.shape)
        for g, w in zip(gradients, weights)
    ]


_replaced_lock = threading.Lock()
_users = collections.Counter()
_originals = {}


@contextlib.contextmanager
def replaced(owner, name: str, make: Callable):
    """Replace a function of TensorFlow by what `make` makes of it, while the context is open.

    Replicas trace in threads of their own, which may enter and leave in any order: the last one to
    leave restores the function.
    """
    with _replaced_lock:
        if not _users[name]:
            _originals[name] = getattr(owner, name)
            setattr(owner, name, make(_originals[name]))
        _users[name] += 1
    try:
        yield
    finally:
        with _replaced_lock:
            _users[name] -= 1
            if not _users[name]:
                setattr(owner, name, _originals.pop(name))


@contextlib.contextmanager
def _second_derivatives_repaired():
    """Replace two functions of TensorFlow whose second derivatives are silently wrong.

    The variance of `tf.nn.moments` hides its dependence on the mean. The first derivative by the
    mean is zero, so that gradients are right, but the second derivatives of batch, layer and group
    normalisation are wrong. `tf.image.resize` has no second derivatives, or raises an error.
    """
    with replaced(tf.nn, "moments", lambda _: _moments), replaced(tf.image, "resize", _linear):
        yield


def _moments(x, axes, shift=None, keepdims=False, name=None):
    y = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
    mean = tf.reduce_mean(y, axes, keepdims=keepdims)
    return tf.cast(mean, x.dtype), tf.cast(tf.math.reduce_variance(y, axes, keepdims), x.dtype)


def _linear(function):
    """Return a function, linear in its first argument, with derivatives of all orders."""

    def linear(x, *args, **kwargs):
        # The derivative of a linear map is its transpose, which is linear, and the transpose of
        # that is the map: each is given to TensorFlow as the derivative of the other.
        @tf.custom_gradient
        def applied(x):
            return function(x, *args, **kwargs), transposed

        @tf.custom_gradient
        def transposed(upstream):
            with tf.GradientTape() as tape:
                zeros = tf.zeros_like(x)
                tape.watch(zeros)
                image = function(zeros, *args, **kwargs)
            return tape.gradient(image, zeros, upstream), applied

        return applied(x)

    return linear
