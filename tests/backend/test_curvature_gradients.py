"""Products with a linearised gradient and third derivatives, against networks in NumPy.

The third derivative along v is the second derivative of the gradient along v. The oracle takes it
by a central stencil of seven points, h = 1e-3 apart along the unit vector of v, from gradients that
are exact to some 10 epsilon: rounding leaves 1e-14 / h^2 = 1e-8 of a gradient, and the stencil, for
a singularity at a distance of d = 0.1, some (h/d)^6 = 1e-12. What is expected may be a tenth of a
gradient: `THIRD`, 1e-6, leaves another factor of 10.
"""

import numpy as np
import numpy_layers as oracle
import pytest
from contract_networks import (
    CASES,
    NORMALIZATIONS,
    SINGLE,
    STENCIL,
    Net,
    array,
    assert_close,
    at_once,
    each,
    mean_of,
    on_tensorflow,
    random_vector,
)

from keras_infomcr import backend

pytestmark = pytest.mark.usefixtures("fast_compilation")

THIRD = 1e-6
WEIGHTS = np.array([2, -27, 270, -490, 270, -27, 2]) / 180


def third_derivative(loss, points, vector, h=1e-3):
    length = np.sqrt(sum((v**2).sum() for v in vector))
    vector = [v / length for v in vector]
    gradients = [
        oracle.derivative(loss, [w + k * h * v for w, v in zip(points, vector)])
        for k in range(-3, 4)
    ]
    sums = [sum(c * g for c, g in zip(WEIGHTS, parts)) for parts in zip(*gradients)]
    return [length**2 * s / h**2 for s in sums]


@each(CASES)
def test_gradient_of_the_curvature_along_a_vector(float64, case):
    net = Net(case)
    vector = random_vector(net)
    function = backend.curvature_gradient(net.objective)
    found = at_once(function, *net.point([array(v) for v in vector]))
    expected = third_derivative(mean_of(net.numpy_losses_of_batch()), net.points, vector)
    assert_close(found, expected, case.tolerance(THIRD))


@each(CASES)
def test_products_with_one_vector_after_another(float64, case):
    net = Net(case)
    vector = random_vector(net)

    def twice(weights, vector, *rest):
        gradients, product = backend.linearized_gradient(net.objective)(weights, *rest)
        return gradients, product(vector), product([2 * v for v in vector])

    _, *products = at_once(twice, *net.point([array(v) for v in vector]))
    loss = mean_of(net.numpy_losses_of_batch())
    for factor, found in zip((1, 2), products):
        expected = oracle.hessian_vector_product(loss, net.points, [factor * v for v in vector])
        assert_close(found, expected, case.tolerance(STENCIL))


@each(NORMALIZATIONS)
def test_curvature_through_normalizations_in_float32(case):
    net = Net(case, "float32")
    vector = random_vector(net)
    function = backend.curvature_gradient(net.objective)
    found = at_once(function, *net.point([array(v, "float32") for v in vector]))
    expected = third_derivative(mean_of(net.numpy_losses_of_batch()), net.points, vector)
    assert_close(found, expected, SINGLE)


@on_tensorflow
@each(CASES)
def test_products_in_a_branch_of_a_graph(float64, case):
    """As the iteration of a training step takes them, once it must go on."""
    import tensorflow as tf

    net = Net(case)
    vector = random_vector(net)

    @tf.function(autograph=False)
    def branched(weights, vector, *rest):
        _, product = backend.linearized_gradient(net.objective)(weights, *rest)
        goes_on = tf.reduce_sum(vector[0]) < 1e9
        return backend.cond(goes_on, lambda: product(vector), lambda: product(weights))

    found = branched(*net.point([array(v) for v in vector]))
    loss = mean_of(net.numpy_losses_of_batch())
    expected = oracle.hessian_vector_product(loss, net.points, vector)
    assert_close(found, expected, case.tolerance(STENCIL))
