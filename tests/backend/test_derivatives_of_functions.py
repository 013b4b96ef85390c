"""The derivatives of small functions: by what they do not depend on, and by what changes."""

import functools

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from contract_networks import (
    FIXED,
    NAMED,
    ROUNDING,
    STENCIL,
    Net,
    as_arrays,
    assert_close,
    each_rows,
    flat,
    mean_of,
    random_vector,
)
from frameworks import array, numpy

from keras_infomcr import backend

pytestmark = pytest.mark.usefixtures("fast_compilation")


# What a function does not depend on. The weights are u, v and w.


def cube_of_the_second(weights, *args):
    return keras.ops.sum(weights[1] ** 3), None


@pytest.fixture
def three_weights(float64):
    return [np.array([1.0, 2.0]), np.array([0.5, -1.0, 2.0]), np.array([[3.0]])]


def test_gradients_by_weights_that_the_value_does_not_depend_on(three_weights):
    (_, _), gradients = backend.value_and_grad(cube_of_the_second)(as_arrays(three_weights))
    assert_only_second(gradients, 3 * three_weights[1] ** 2)


@pytest.mark.parametrize("given", [False, True], ids=["gradient", "vector"])
def test_products_by_weights_that_the_value_does_not_depend_on(three_weights, given):
    vector = [np.ones_like(w) for w in three_weights]
    direction = vector[1] if given else 3 * three_weights[1] ** 2
    _, gradients, products = backend.value_grad_and_hessian_product(cube_of_the_second)(
        as_arrays(three_weights), as_arrays(vector) if given else None
    )
    assert_only_second(gradients, 3 * three_weights[1] ** 2)
    assert_only_second(products, 6 * three_weights[1] * direction)


SUM, ONE = (lambda w: sum(keras.ops.sum(a) for a in w)), (lambda w: array(1.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_products_with_several_vectors(three_weights, compiled):
    vectors = [np.stack([np.ones_like(w), 2 * np.cos(w)]) for w in three_weights]
    args = as_arrays(three_weights), as_arrays(vectors)
    cube = backend.hessian_vector_products(lambda w: cube_of_the_second(w)[0], compiled)
    assert_only_second(cube(*args), 6 * three_weights[1] * vectors[1])
    for function in (SUM, ONE):
        products = backend.hessian_vector_products(function, compiled)(*args)
        assert not np.any(flat(products, vectors))


def test_products_with_several_vectors_through_layer_normalization_without_scale(float64):
    net = Net(NAMED["layer_norm_without_scale"])
    weights, *args = net.point()
    vectors = [random_vector(net), random_vector(net)]
    products = backend.hessian_vector_products(lambda w, *args: net.objective(w, *args)[0])
    found = products(weights, as_arrays([np.stack(v) for v in zip(*vectors)]), *args)
    loss = mean_of(net.numpy_losses_of_batch())
    for k, vector in enumerate(vectors):
        expected = oracle.hessian_vector_product(loss, net.points, vector)
        assert_close([numpy(p)[k] for p in found], expected, STENCIL)


def test_products_of_a_linear_function_are_zero(three_weights):
    def linear(weights):
        return sum(keras.ops.sum(w) for w in weights), None

    _, gradients, products = backend.value_grad_and_hessian_product(linear)(
        as_arrays(three_weights), None
    )
    np.testing.assert_array_equal(flat(gradients, three_weights), 1)
    np.testing.assert_array_equal(flat(products, three_weights), 0)


@each_rows
def test_rows_of_weights_that_the_values_do_not_depend_on_are_zero(three_weights, make_rows):
    def values(weights, context, x):
        return x * cube_of_the_second(weights)[0]

    jacobian = make_rows(values)
    _, rows = jacobian(as_arrays(three_weights), [], array([1.0, 2.0]))
    expected = np.outer([1.0, 2.0], 3 * three_weights[1] ** 2)
    assert [r.shape for r in map(numpy, rows)] == [(2, 2), (2, 3), (2, 1, 1)]
    assert_only_second(rows, expected)


def constant(weights, *args):
    return array(1.0), None


def test_gradients_of_a_constant(three_weights):
    (value, _), gradients = backend.value_and_grad(constant)(as_arrays(three_weights))
    assert float(numpy(value)) == 1.0
    assert not np.any(flat(gradients, three_weights))


def test_products_of_a_constant(three_weights):
    product = backend.value_grad_and_hessian_product(constant)
    _, gradients, products = product(as_arrays(three_weights), None)
    assert not np.any(flat(gradients, three_weights))
    assert not np.any(flat(products, three_weights))


@each_rows
def test_rows_of_values_that_depend_on_no_weight_are_zero(three_weights, make_rows):
    jacobian = make_rows(lambda weights, context, x: x)
    values, rows = jacobian(as_arrays(three_weights), [], array([1.0, 2.0]))
    np.testing.assert_array_equal(numpy(values), [1.0, 2.0])
    assert [r.shape for r in map(numpy, rows)] == [(2, 2), (2, 3), (2, 1, 1)]
    assert not any(np.any(numpy(r)) for r in rows)


def assert_only_second(got, expected):
    first, second, third = got
    assert all(g is None or not np.any(numpy(g)) for g in (first, third))
    np.testing.assert_allclose(numpy(second), expected, rtol=1e-15)


# Compiled Jacobians


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@each_rows
def test_jacobian_follows_weights_state_and_data(float64, make_rows, compiled):
    net = Net(NAMED["dense"])
    jacobian = make_rows(net.example_losses, compiled)
    jacobian(net.weights, net.state, *net.args)
    net.points = [2 * w for w in net.points]
    net.x, net.y = net.x[::-1].copy(), net.y[::-1].copy()
    _, rows = jacobian(as_arrays(net.points), net.state, array(net.x), array(net.y))
    assert_close(rows, oracle.derivative(net.numpy_losses_of_batch(), net.points), ROUNDING)


def test_jacobian_follows_the_context(float64):
    net = Net(NAMED["batch_norm"])
    jacobian = backend.gradients_by_example(functools.partial(net.example_losses, training=False))
    jacobian(net.weights, net.state, *net.args)
    with_other_moments = [
        s + 1 if "moving" in v.name else s
        for v, s in zip(net.model.non_trainable_variables, net.state)
    ] + net.state[len(net.model.non_trainable_variables) :]
    _, rows = jacobian(net.weights, with_other_moments, *net.args)

    def forward(w, x):
        moments = FIXED["moving_mean"] + 1, FIXED["moving_variance"] + 1
        hidden = oracle.normalize(x @ w[0] + w[1], *moments, w[2], w[3])
        return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]

    losses = net.numpy_function(slice(None), forward=forward)
    assert_close(rows, oracle.derivative(losses, net.points), ROUNDING)
