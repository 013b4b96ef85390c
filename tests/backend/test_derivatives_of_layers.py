"""The derivatives of networks, layer by layer, against networks written in NumPy."""

import functools

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from contract_networks import (
    ALPHA,
    CASES,
    DIFFERENCE,
    ESTIMATORS,
    MODES,
    NAMED,
    NORMALIZATIONS,
    ROUNDING,
    ROWS,
    SINGLE,
    SIZES,
    STENCIL,
    Net,
    assert_close,
    at_once,
    each,
    mean_of,
    on_tensorflow,
    random_vector,
    regularize,
)
from frameworks import array, numpy
from parameters import with_slow

from keras_infomcr import backend

pytestmark = pytest.mark.usefixtures("fast_compilation")

# The heaviest, which share most operations with others: CI alone tries all of their derivatives.
REPEATS = ("lstm", "multi_head_attention", "depthwise_conv_2d", "layer_norm_without_scale",
           "group_norm", "frozen_batch_norm")  # fmt: skip


def each_but_repeats(cases):
    marked = with_slow(cases, *(case for case in cases if case.name in REPEATS))
    return pytest.mark.parametrize("case", marked, ids=lambda case: case.name)


@each(CASES)
def test_value_and_gradient(float64, case):
    net = Net(case)
    (value, _), gradients = at_once(backend.value_and_grad(net.objective), *net.point())
    loss = mean_of(net.numpy_losses_of_batch())
    assert_close(numpy(value), loss(net.points), case.tolerance(ROUNDING))
    assert_close(gradients, oracle.derivative(loss, net.points), case.tolerance(ROUNDING))


@each_but_repeats(CASES)
def test_hessian_vector_product_with_the_gradient_and_with_a_given_vector(float64, case):
    net = Net(case)
    assert_products(net, net.objective, mean_of(net.numpy_losses_of_batch()), case.tolerance)


def assert_products(net, function, loss, tolerance):
    product = backend.value_grad_and_hessian_product(function)
    vector = random_vector(net)

    def both(weights, given, *rest):
        return product(weights, None, *rest), product(weights, given, *rest)

    results = at_once(both, *net.point([array(v) for v in vector]))
    gradient = oracle.derivative(loss, net.points)
    for v, ((value, _), gradients, products) in zip([gradient, vector], results):
        expected = oracle.hessian_vector_product(loss, net.points, v)
        assert_close(numpy(value), loss(net.points), tolerance(ROUNDING))
        assert_close(gradients, gradient, tolerance(ROUNDING))
        assert_close(products, expected, tolerance(STENCIL))


@each_but_repeats(CASES)
def test_gradients_of_each_example_through_the_whole_batch(float64, case):
    net = Net(case)
    jacobian = backend.jacobian(net.example_losses)
    values, rows = jacobian(net.weights, net.state, *net.args)
    losses = net.numpy_losses_of_batch()
    assert_close(numpy(values), losses(net.points), case.tolerance(ROUNDING))
    assert_close(rows, oracle.derivative(losses, net.points), case.tolerance(ROUNDING))


@each_but_repeats([case for case in CASES if not case.couples])
def test_gradients_of_each_example_by_itself(float64, case):
    net = Net(case)
    jacobian = backend.gradients_by_example(net.example_losses)
    values, rows = jacobian(net.weights, net.state, *net.args)
    mask = net.masks([1])[0] if case.drops else None  # every example starts from the same state
    losses = net.numpy_function(slice(None), mask)
    assert_close(numpy(values), losses(net.points), case.tolerance(ROUNDING))
    assert_close(rows, oracle.derivative(losses, net.points), case.tolerance(ROUNDING))


@each_but_repeats(CASES)
def test_sub_batches_by_either_estimator(float64, case):
    net = Net(case)
    finite, products = regularize(net, *ESTIMATORS)
    parts = [mean_of(part) for part in net.numpy_parts(SIZES)]
    assert_averages(case, finite, [finite_difference(p, net.points) for p in parts], DIFFERENCE)
    assert_averages(case, products, [curvature(p, net.points) for p in parts], STENCIL)


def finite_difference(loss, points):
    g = oracle.derivative(loss, points)
    moved = [w - ALPHA * d for w, d in zip(points, g)]
    difference = [a - b for a, b in zip(g, oracle.derivative(loss, moved))]
    return loss(points) - loss(moved), difference, g


def curvature(loss, points):
    g = oracle.derivative(loss, points)
    products = oracle.hessian_vector_product(loss, points, g)
    return ALPHA * sum((d**2).sum() for d in g), [ALPHA * p for p in products], g


def assert_averages(case, result, parts, tolerance):
    value, gradient, loss_gradient = result
    fractions = np.divide(SIZES, sum(SIZES))
    values, gradients, loss_gradients = zip(*parts)
    assert_close(numpy(value), fractions @ values, case.tolerance(tolerance))
    assert_close(gradient, weighted(fractions, gradients), case.tolerance(tolerance))
    assert_close(loss_gradient, weighted(fractions, loss_gradients), case.tolerance(ROUNDING))


def weighted(fractions, lists):
    return [sum(f * a for f, a in zip(fractions, arrays)) for arrays in zip(*lists)]


@pytest.mark.parametrize("case, forward", MODES, ids=["batch_norm", "dropout"])
def test_products_in_inference_mode(float64, case, forward):
    net = Net(case)

    def inference(weights, state, batch):
        losses = net.example_losses(weights, state, batch.x, batch.y, training=False)
        return keras.ops.mean(losses), None

    loss = mean_of(net.numpy_function(slice(None), forward=forward))
    assert_products(net, inference, loss, case.tolerance)


@pytest.mark.parametrize("case, forward", MODES, ids=["batch_norm", "dropout"])
def test_gradients_of_each_example_in_inference_mode(float64, case, forward):
    net = Net(case)
    inference = functools.partial(net.example_losses, training=False)
    expected = oracle.derivative(net.numpy_function(slice(None), forward=forward), net.points)
    for make_rows in ROWS.values():
        _, rows = make_rows(inference)(net.weights, net.state, *net.args)
        assert_close(rows, expected, ROUNDING)


@each([NAMED["batch_norm"], NAMED["dropout"]])
def test_auxiliary_is_that_of_the_function(float64, case):
    net = Net(case)
    (_, expected), ((_, first), _), ((_, second), _, _) = at_once(
        lambda weights, state, batch: (
            net.objective(weights, state, batch),
            backend.value_and_grad(net.objective)(weights, state, batch),
            backend.value_grad_and_hessian_product(net.objective)(weights, None, state, batch),
        ),
        *net.point(),
    )
    for auxiliary in (first, second):
        for got, wanted in zip(keras.tree.flatten(auxiliary), keras.tree.flatten(expected)):
            np.testing.assert_allclose(numpy(got), numpy(keras.ops.copy(wanted)), rtol=ROUNDING)


# Precision


@each(NORMALIZATIONS)
def test_products_through_normalizations_in_float32(case):
    net = Net(case, "float32")
    vector = random_vector(net)
    product = backend.value_grad_and_hessian_product(net.objective)
    _, _, products = at_once(product, *net.point([array(v, "float32") for v in vector]))
    assert all(keras.backend.standardize_dtype(p.dtype) == "float32" for p in products)
    loss = mean_of(net.numpy_losses_of_batch())
    assert_close(products, oracle.hessian_vector_product(loss, net.points, vector), SINGLE)


@on_tensorflow
@each(NORMALIZATIONS)
def test_products_through_normalizations_in_a_graph(float64, case):
    import tensorflow as tf

    net = Net(case)
    vector = random_vector(net)
    product = tf.function(backend.value_grad_and_hessian_product(net.objective), autograph=False)
    _, _, products = product(*net.point([array(v) for v in vector]))
    loss = mean_of(net.numpy_losses_of_batch())
    assert_close(products, oracle.hessian_vector_product(loss, net.points, vector), STENCIL)
