"""The penalty on the spectral radius, against eigenvalues in closed form.

`tests/backend/test_curvature_gradients.py` has those of networks.
"""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy
from keras import layers, ops
from parameters import slow_but

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SpectralRadius
from keras_infomcr.regularizers.dominant_eigenpair import dominant_eigenpair

EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
# So small that the error of the vector counts for nothing.
EXACT = {"max_products": 12, "tolerance": 1e-10, "seed": 0}


def step_of(model, x, y, **arguments):
    """Return the rule's `Step`, starting from the vector that it draws."""
    rule = SpectralRadius(**EXACT | arguments)
    rule.build(model.trainable_variables)
    return rule(Objective(model), Batch(x, y), [ops.copy(v) for v in rule.memory])


def test_logistic_regression(float64, rng):
    """H = X^T diag(p (1 - p)) X / N, whose slope is mean_i p (1 - p) (1 - 2 p) (x_i . v)^2 x_i."""
    x, w = rng.normal(size=(20, 5)), rng.normal(size=5)
    y = (rng.random(20) < 0.5).astype(float)
    inputs = keras.Input((5,))
    model = RegularizedModel(inputs, layers.Dense(1, use_bias=False)(inputs))
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    model.set_weights([w[:, None]])
    step = step_of(model, array(x), array(y[:, None]))
    p = 1 / (1 + np.exp(-x @ w))
    values, vectors = np.linalg.eigh((x.T * (p * (1 - p))) @ x / 20)
    slopes = p * (1 - p) * (1 - 2 * p) * (x @ vectors[:, -1]) ** 2
    assert float(numpy(step.value)) == pytest.approx(values[-1], rel=1e-12)
    # The vector is exact to the tolerance over the relative distance to the next eigenvalue.
    np.testing.assert_allclose(numpy(step.gradient[0]).ravel(), x.T @ slopes / 20, atol=1e-8)


class Valley(layers.Layer):
    """s/2 x^2 (1 + y^2) for each example, whose Hessian at x = 0 has the eigenvalue s (1 + y^2)."""

    def __init__(self, sign, y):
        super().__init__()
        self.sign, self.start = sign, y

    def build(self, shape):
        self.x = self.add_weight((), "zeros")
        self.y = self.add_weight((), keras.initializers.Constant(self.start))

    def call(self, inputs):
        return 0 * inputs + self.sign / 2 * ops.square(self.x) * (1 + ops.square(self.y))


def valley(sign, y=1.5, rule=None, rate=0.05):
    inputs = keras.Input((1,))
    model = RegularizedModel(inputs, Valley(sign, y)(inputs))
    optimizer = keras.optimizers.SGD(rate)
    model.compile(optimizer, lambda _, p: ops.mean(p, axis=-1), regularizer=rule, **EAGER)
    return model


ONE = np.zeros((4, 1))


@pytest.mark.parametrize("sign", [1, -1], ids=["minimum", "saddle"])
def test_a_negative_eigenvalue_is_made_smaller_too(float64, sign):
    step = step_of(valley(sign), array(ONE), array(ONE))
    assert float(numpy(step.value)) == pytest.approx(1 + 1.5**2, rel=1e-12)
    np.testing.assert_allclose([float(numpy(g)) for g in step.gradient], [0, 2 * 1.5], atol=1e-12)


@pytest.mark.parametrize("sign", slow_but([1, -1], -1), ids=["minimum", "saddle"])
def test_training_drives_the_spectral_radius_to_the_threshold(float64, sign):
    """y shrinks by 2 rate strength = 10 % in each step, until y^2 + 1 is below the threshold."""
    model = valley(sign, rule=SpectralRadius(1.0, threshold=2.0, seed=0))
    radii = [model.fit(ONE, ONE, verbose=0).history["spectral_radius"][0] for _ in range(8)]
    y = float(numpy(model.layers[-1].y))
    np.testing.assert_allclose(y, 1.5 * 0.9**4, rtol=1e-6)  # 0.98, the first power below 1
    np.testing.assert_allclose(radii[-1], 1 + y**2, rtol=1e-6)
    model.regularizer.threshold = 1.5
    model.fit(ONE, ONE, verbose=0)
    assert float(numpy(model.layers[-1].y)) == pytest.approx(0.9 * y, rel=1e-6)


def perceptron(rule=None, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, layers.Dense(2)(layers.Dense(5, "tanh")(inputs)))
    model.compile(keras.optimizers.SGD(0.05), "mse", regularizer=rule, **EAGER | kwargs)
    return model


def test_steps_that_have_not_converged_are_counted_and_add_nothing(rng):
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
    rule = SpectralRadius(1.0, max_products=1, tolerance=1e-9, seed=0)
    model, plain = perceptron(rule), perceptron()
    logs = model.fit(x, y, batch_size=4, verbose=0, shuffle=False).history
    plain.fit(x, y, batch_size=4, verbose=0, shuffle=False)
    assert logs["spectral_radius_unconverged"] == [1.0]
    for ours, expected in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    lenient = perceptron(SpectralRadius(1.0, max_products=1, tolerance=1e9, seed=0))
    logs = lenient.fit(x, y, batch_size=4, verbose=0, shuffle=False).history
    assert logs["spectral_radius_unconverged"] == [0.0]
    assert np.max(np.abs(lenient.get_weights()[0] - plain.get_weights()[0])) > 1e-5


def test_steps_go_on_from_the_vector_before(float64, rng):
    """Two products a step, of the same batch and weights, close in on what one step could not."""
    x, y = array(rng.normal(size=(8, 4))), array(rng.normal(size=(8, 2)))
    model = perceptron()
    rule = SpectralRadius(max_products=2, tolerance=1e-9, seed=0)
    rule.build(model.trainable_variables)
    memory, radii = [ops.copy(v) for v in rule.memory], []
    for _ in range(12):
        step = rule(Objective(model), Batch(x, y), memory)
        memory = step.memory
        radii.append(float(numpy(step.value)))
    exact = float(numpy(step_of(model, x, y).value))
    assert radii[0] < 0.99 * exact
    assert radii[-1] == pytest.approx(exact, rel=1e-3)


def test_the_hessian_of_some_examples(float64, rng):
    x, y = array(rng.normal(size=(8, 4))), array(rng.normal(size=(8, 2)))
    model = perceptron()
    some, first = step_of(model, x, y, num_examples=3), step_of(model, x[:3], y[:3])
    whole, more = step_of(model, x, y), step_of(model, x, y, num_examples=9)
    for a, b in ((some, first), (whole, more)):
        np.testing.assert_array_equal(numpy(a.value), numpy(b.value))
        for g, h in zip(a.gradient, b.gradient, strict=True):
            np.testing.assert_array_equal(numpy(g), numpy(h))
    assert abs(float(numpy(some.value)) / float(numpy(whole.value)) - 1) > 0.01


@pytest.mark.parametrize("seed", [None, 3])
def test_the_seed_determines_the_start(seed):
    def start(global_seed):
        keras.utils.set_random_seed(global_seed)
        rule = SpectralRadius(seed=seed)
        rule.build([keras.Variable(np.zeros((50, 2)))])
        return numpy(rule.memory[0])

    np.testing.assert_array_equal(start(1), start(1))
    assert np.array_equal(start(1), start(2)) == (seed is not None)
    assert np.linalg.norm(start(1)) == pytest.approx(1, rel=1e-6)


def product_with(matrix, calls):
    def product(vector):
        calls.append(vector)
        return ops.sum(array(matrix) * vector, axis=1)

    return product


def rotated(rng, values):
    basis, _ = np.linalg.qr(rng.normal(size=(len(values),) * 2))
    return (basis * values) @ basis.T


@pytest.mark.parametrize("cond", [backend.cond, None], ids=["branches", "replicas"])
@pytest.mark.parametrize(
    "values",
    [[3, 2, 1, 0.5, 0.1, 0], [-3, 2.99, 1, 1, 0.1, 0], [3, 0, 0, 0, 0, 0], [2, 2, 2, -1, -1, 0]],
    ids=["positive", "opposite", "of rank one", "repeated"],
)
def test_the_dominant_eigenpair(float64, rng, values, cond):
    matrix = rotated(rng, np.array(values, float))
    start = array(rng.normal(size=6))
    pair = dominant_eigenpair(product_with(matrix, []), start, 1e-9, 6, cond)
    vector = numpy(pair.vector)
    assert float(numpy(pair.value)) == pytest.approx(max(values, key=abs), rel=1e-12)
    assert bool(numpy(pair.converged)) and vector @ numpy(start) > 0
    np.testing.assert_allclose(matrix @ vector, max(values, key=abs) * vector, atol=1e-8)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX traces both branches.")
def test_no_product_is_computed_once_it_has_converged(float64, rng):
    matrix, calls = rotated(rng, np.array([5.0, 1, 0.5, 0.1, 0, 0])), []
    product, start = product_with(matrix, calls), array(rng.normal(size=6))
    first = dominant_eigenpair(product, start, 0.1, 6, backend.cond)
    assert 2 <= len(calls) <= 4
    calls.clear()
    dominant_eigenpair(product, first.vector, 0.11, 6, backend.cond)
    assert len(calls) == 1


@pytest.mark.parametrize("cond", [backend.cond, None], ids=["branches", "replicas"])
def test_a_product_that_is_not_finite_leaves_the_start(rng, cond):
    start = array(rng.normal(size=6), "float32")
    pair = dominant_eigenpair(lambda v: v * float("nan"), start, 0.1, 3, cond)
    np.testing.assert_array_equal(numpy(pair.vector), numpy(start))
    assert np.isnan(numpy(pair.value)) and not bool(numpy(pair.converged))


def test_a_hessian_of_zero_is_an_answer(rng):
    pair = dominant_eigenpair(ops.zeros_like, array(rng.normal(size=6)), 0.1, 3, backend.cond)
    assert float(numpy(pair.value)) == 0 and bool(numpy(pair.converged))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"strength": -1.0}, r"`strength` must be a finite number, 0 or greater\. Received: st"),
        ({"threshold": -1.0}, r"`threshold` must be a finite number, 0 or greater\. Received: thr"),
        ({"max_products": 0}, r"`max_products` must be an integer of at least 1\. Received: max"),
        ({"tolerance": 0.0}, r"`tolerance` must be a finite number greater than 0\. Received: to"),
        ({"num_examples": 0}, r"`num_examples` must be an integer of at least 1\. Received: num"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 2147483647\. Received: seed=-1"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        SpectralRadius(**argument)


def test_weights_of_half_precision_are_refused(rng):
    keras.config.set_dtype_policy("bfloat16")
    model = perceptron(SpectralRadius())
    with pytest.raises(ValueError, match=r"Weights must be float32 or float64.*Received: half-pr"):
        model.train_on_batch(rng.normal(size=(4, 4)), rng.normal(size=(4, 2)))
