"""Products with a linearised gradient and third derivatives, against networks in NumPy.

The third derivative along v is the second derivative of the gradient along v. The oracle takes it
by a central stencil of seven points, h = 1e-3 apart along the unit vector of v, from gradients that
are exact to some 10 epsilon: rounding leaves 1e-14 / h^2 = 1e-8 of a gradient, and the stencil, for
a singularity at a distance of d = 0.1, some (h/d)^6 = 1e-12. What is expected may be a tenth of a
gradient: `THIRD`, 1e-6, leaves another factor of 10.
"""

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from contract_networks import (
    CASES,
    NORMALIZATIONS,
    SINGLE,
    STENCIL,
    Case,
    Net,
    assert_close,
    at_once,
    each,
    flat,
    mean_of,
    on_tensorflow,
    random_vector,
)
from frameworks import array, numpy
from keras import layers
from scipy.special import erf

from keras_infomcr import backend
from keras_infomcr.objective import Batch
from keras_infomcr.regularizers import SpectralRadius

pytestmark = pytest.mark.usefixtures("fast_compilation")

THIRD = 1e-6
FAST = {"dense", "batch_norm", "layer_norm", "group_norm"}
with_each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c.name in FAST else pytest.mark.slow) for c in CASES],
)
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


@with_each_case
def test_gradient_of_the_curvature_along_a_vector(float64, case):
    net = Net(case)
    vector = random_vector(net)
    function = backend.curvature_gradient(net.objective)
    found = at_once(function, *net.point([array(v) for v in vector]))
    expected = third_derivative(mean_of(net.numpy_losses_of_batch()), net.points, vector)
    assert_close(found, expected, case.tolerance(THIRD))


# What they are for: the slope of the spectral radius.


def gelu_net(w, x):
    hidden = x @ w[0] + w[1]
    real = np.real(hidden) / np.sqrt(2)
    # To first order in the imaginary part, which is a complex step.
    error = erf(real) + 1j * np.imag(hidden) * np.sqrt(2 / np.pi) * np.exp(-(real**2))
    return (hidden / 2 * (1 + error)) @ w[2] + w[3]


GELU = Case("gelu", (4,), lambda x: layers.Dense(2)(layers.Dense(3, "gelu")(x)), gelu_net)


def radius_of(loss, points):
    """Return the spectral radius of the whole Hessian, with errors of the order of 1e-11."""
    stops, rows = np.cumsum([w.size for w in points]), []
    for unit in np.eye(stops[-1]):
        parts = np.split(unit, stops[:-1])
        vector = [p.reshape(w.shape) for p, w in zip(parts, points)]
        rows.append(flat(oracle.hessian_vector_product(loss, points, vector)))
    return np.abs(np.linalg.eigvalsh((np.array(rows) + np.array(rows).T) / 2)).max()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GELU, id="gelu"),
        *(pytest.param(c, id=c.name, marks=pytest.mark.slow) for c in NORMALIZATIONS),
    ],
)
def test_gradient_of_the_rule_is_the_slope_of_the_spectral_radius(float64, case):
    """The slope along a random direction u, by a difference of five points h |u| = 3e-3 apart.

    Rounding leaves 1e-11 / 1e-3, the difference some (3e-3 / d)^4 for a singularity at a distance
    of d, which is 0.1 for the normalisations: 1e-6. TensorFlow rounds the root of 2 in GELU to
    float32, which is 3e-8 of it.
    """
    net = Net(case)
    rule = SpectralRadius(max_products=40, tolerance=1e-10, seed=0)
    rule.build(net.model.trainable_variables)
    step = rule(net.objective, Batch(*net.args), [keras.ops.copy(rule.memory[0])])
    loss = mean_of(net.numpy_losses_of_batch())
    assert float(numpy(step.value)) == pytest.approx(radius_of(loss, net.points), rel=1e-7)
    direction = [v * 1e-3 for v in random_vector(net)]
    slope = sum(
        c * radius_of(loss, [w + k * u for w, u in zip(net.points, direction)])
        for k, c in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))
    )
    expected = flat(step.gradient, net.points) @ flat(direction)
    assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert abs(slope) > 1e-5


@with_each_case
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


@pytest.mark.slow
@each(NORMALIZATIONS)
def test_curvature_through_normalizations_in_float32(case):
    net = Net(case, "float32")
    vector = random_vector(net)
    function = backend.curvature_gradient(net.objective)
    found = at_once(function, *net.point([array(v, "float32") for v in vector]))
    expected = third_derivative(mean_of(net.numpy_losses_of_batch()), net.points, vector)
    assert_close(found, expected, SINGLE)


@on_tensorflow
@pytest.mark.slow
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
