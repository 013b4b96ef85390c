"""What `keras_infomcr.backend` promises, layer by layer, against networks written in NumPy.

The oracles (`numpy_layers`) know the weights alone. Tolerances are errors in norm, relative to the
norm of what is expected; weights, data and losses are of order one.

* `ROUNDING`: in float64 (epsilon 2e-16) a loss or a gradient takes some 1e3 operations, and the
  complex step is exact to rounding: 1e3 * 2e-16, and a factor 5 for cancellation. 1e-12.
* `STENCIL`: the oracle of H v is off by 4e-12 of the gradient that it differences (its docstring),
  and H v may be a hundredth of that. 1e-9.
* `DIFFERENCE`: losses are off by some 1e-15 and R_alpha, the difference of two, is of the order
  alpha |g|^2, at least 1e-4 here; likewise the gradients. 1e-10.
* `SINGLE`: in float32 (epsilon 6e-8) some 1e2 operations and the divisions by standard deviations
  leave 1e-5 of H v, and with alpha = 0.03 the like of a difference of gradients. 1e-4. It also
  stands for float64 where JAX attends: `jax.nn.dot_product_attention` has its softmax in float32.
"""

import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from frameworks import BACKEND, array, numpy, only_on
from keras import layers

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation

ROUNDING, STENCIL, DIFFERENCE, SINGLE = 1e-12, 1e-9, 1e-10, 1e-4

ALPHA = 0.03
ESTIMATORS = "finite_difference", "hessian_vector_product"
SIZES = [2, 3]  # of the sub-batches of a batch of 5
VOCABULARY = 5
FIXED = {
    "moving_mean": np.array([0.5, -0.25, 0.125]),
    "moving_variance": np.array([1.5, 0.75, 2.0]),
    "gamma": np.array([-0.5, 1.25, 0.75]),
    "beta": np.array([0.25, 0.5, -0.125]),
}

on_tensorflow = only_on("tensorflow", reason="tf.nn.moments is TensorFlow's")
on_torch = only_on("torch", reason="of torch's parameters and generator")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, in Keras and in NumPy.

    Attributes:
        name: Name of the layer that it is about.
        shape: Shape of an example.
        layers: Function from a Keras tensor to predictions.
        forward: Function `(weights, x) -> predictions`, in NumPy; `(weights, x, mask)` where
            `drops`.
        loss: `"squared_error"` or `"cross_entropy"`.
        integers: Whether an example is made of integers below `VOCABULARY`.
        couples: Whether an example's loss depends on the other examples.
        drops: Whether the inputs go through a layer named `"dropout"`.
        single_on: A backend that computes the layer in float32 even where Keras has float64.
    """

    name: str
    shape: tuple
    layers: Callable
    forward: Callable
    loss: str = "squared_error"
    integers: bool = False
    couples: bool = False
    drops: bool = False
    single_on: str = ""

    def tolerance(self, tolerance):
        return SINGLE if self.single_on == BACKEND else tolerance


def conv_2d(w, x):
    hidden = np.tanh(oracle.conv_2d(x, w[0], w[1], stride=2, padding=(0, 1)))
    return oracle.flatten(hidden) @ w[2] + w[3]


def depthwise_conv_2d(w, x):
    return oracle.flatten(np.tanh(oracle.depthwise_conv_2d(x, w[0], w[1]))) @ w[2] + w[3]


def batch_norm_training(w, x):
    hidden = oracle.normalize_by_own_moments(x @ w[0] + w[1], (0, 1, 2), w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def batch_norm_inference(w, x):
    moments = FIXED["moving_mean"], FIXED["moving_variance"]
    hidden = oracle.normalize(x @ w[0] + w[1], *moments, w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def frozen_batch_norm(w, x):
    return batch_norm_inference([w[0], w[1], FIXED["gamma"], FIXED["beta"], w[2], w[3]], x)


def layer_norm(w, x):
    hidden = oracle.normalize_by_own_moments(x @ w[0] + w[1], -1, w[2], w[3])
    return np.tanh(hidden) @ w[4] + w[5]


def layer_norm_without_scale(w, x):
    return layer_norm([w[0], w[1], np.ones(4), *w[2:]], x)


def group_norm(w, x):
    hidden = oracle.group_norm(x @ w[0] + w[1], 2, w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def pooling(w, x):
    hidden = np.tanh(oracle.conv_2d(x, w[0], w[1]))
    return oracle.flatten(oracle.average_pool_2d(oracle.max_pool_2d(hidden))) @ w[2] + w[3]


def embedding(w, x):
    return np.tanh(oracle.flatten(w[0][x])) @ w[1] + w[2]


def lstm(w, x):
    return oracle.lstm(x, *w[:3]) @ w[3] + w[4]


def attention(w, x):
    query, value, scale = x @ w[0] + w[1], x @ w[2] + w[3], w[4]
    weights = oracle.softmax(scale * (query @ np.swapaxes(value, 1, 2)))
    return oracle.flatten(np.tanh(weights @ value)) @ w[5] + w[6]


def multi_head_attention(w, x):
    return oracle.flatten(np.tanh(oracle.self_attention(x, *w[:8]))) @ w[8] + w[9]


def perceptron(w, x, mask=1.0):
    return np.tanh((x * mask) @ w[0] + w[1]) @ w[2] + w[3]


def tanh_and_dense(x, units=2):
    return layers.Dense(units)(layers.Flatten()(layers.Activation("tanh")(x)))


def normalized(x, width, normalization):
    return tanh_and_dense(normalization(layers.Dense(width)(x)))


def pooled(x):
    x = layers.Conv2D(2, 2, activation="tanh")(x)
    x = layers.AveragePooling2D(2)(layers.MaxPooling2D(2)(x))
    return layers.Dense(2)(layers.Flatten()(x))


def attended(x):
    query, value = layers.Dense(2)(x), layers.Dense(2)(x)
    return tanh_and_dense(layers.Attention(use_scale=True)([query, value]))


def dropped(x, seed):
    x = layers.Dropout(0.5, seed=seed, name="dropout")(x)
    return layers.Dense(2)(layers.Dense(3, "tanh")(x))


def dropped_and_normalized(x):
    return normalized(layers.Dropout(0.5)(x), 3, layers.BatchNormalization())


# Keras's mean over a batch, Keras's losses of the examples, and these in NumPy.
LOSSES = {
    "squared_error": (
        keras.losses.MeanSquaredError,
        keras.losses.mean_squared_error,
        oracle.squared_errors,
    ),
    "cross_entropy": (
        functools.partial(keras.losses.CategoricalCrossentropy, from_logits=True),
        functools.partial(keras.losses.categorical_crossentropy, from_logits=True),
        oracle.cross_entropies,
    ),
}

CASES = [
    Case("dense", (4,), lambda x: layers.Dense(3)(layers.Dense(3, "tanh")(x)), perceptron,
         loss="cross_entropy"),
    Case("conv_2d", (4, 4, 2),
         lambda x: tanh_and_dense(layers.Conv2D(2, 3, strides=2, padding="same")(x)),
         conv_2d),
    Case("depthwise_conv_2d", (3, 3, 2),
         lambda x: tanh_and_dense(layers.DepthwiseConv2D(2, depth_multiplier=2)(x)),
         depthwise_conv_2d),
    Case("batch_norm", (2, 2, 2),
         lambda x: normalized(x, 3, layers.BatchNormalization()), batch_norm_training,
         couples=True),
    Case("frozen_batch_norm", (2, 2, 2),
         lambda x: normalized(x, 3, layers.BatchNormalization(trainable=False)),
         frozen_batch_norm),
    Case("layer_norm", (3,), lambda x: normalized(x, 4, layers.LayerNormalization()), layer_norm),
    Case("layer_norm_without_scale", (3,),
         lambda x: normalized(x, 4, layers.LayerNormalization(scale=False)),
         layer_norm_without_scale),
    Case("group_norm", (2, 2, 2), lambda x: normalized(x, 4, layers.GroupNormalization(2)),
         group_norm),
    Case("pooling", (5, 5, 1), pooled, pooling),
    Case("embedding", (3,), lambda x: tanh_and_dense(layers.Embedding(VOCABULARY, 2)(x)),
         embedding, integers=True),
    Case("lstm", (3, 2), lambda x: layers.Dense(2)(layers.LSTM(2)(x)), lstm),
    Case("attention", (3, 2), attended, attention),
    Case("multi_head_attention", (3, 2),
         lambda x: tanh_and_dense(layers.MultiHeadAttention(num_heads=2, key_dim=4)(x, x), 3),
         multi_head_attention, loss="cross_entropy", single_on="jax"),
    Case("dropout", (6,), lambda x: dropped(x, seed=7), perceptron, drops=True),
]  # fmt: skip
if BACKEND == "torch":  # the others draw a seed when the layer is made
    CASES.append(
        Case("unseeded_dropout", (6,), lambda x: dropped(x, seed=None), perceptron, drops=True)
    )
NAMED = {case.name: case for case in CASES}
NORMALIZATIONS = [NAMED[name] for name in ("batch_norm", "layer_norm", "group_norm")]
MODES = [(NAMED["batch_norm"], batch_norm_inference), (NAMED["dropout"], perceptron)]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Net:
    """A compiled model with weights, an objective and a batch; their like in NumPy.

    All numbers are float32's, so that a float32 model stands at the same point.

    Args:
        case: A `Case`.
        dtype: The dtype of weights and inputs.
    """

    def __init__(self, case, dtype="float64"):
        rng = np.random.default_rng(0)
        inputs = keras.Input(case.shape, dtype="int32" if case.integers else dtype)
        self.case = case
        self.model = RegularizedModel(inputs, case.layers(inputs))
        keras_loss, self.keras_losses, self.numpy_losses = LOSSES[case.loss]
        self.model.compile("sgd", keras_loss())
        self.points = [draw(rng, v.shape) for v in self.model.trainable_variables]
        for variable, point in zip(self.model.trainable_variables, self.points):
            variable.assign(point.astype(dtype))
        for variable in self.model.non_trainable_variables:
            if variable.name in FIXED:
                variable.assign(FIXED[variable.name].astype(dtype))
        self.x = draw(rng, (sum(SIZES), *case.shape))
        if case.integers:
            self.x = rng.integers(VOCABULARY, size=self.x.shape).astype("int32")
        self.y = draw(rng, (sum(SIZES), *self.model.output_shape[1:]))
        if case.loss == "cross_entropy":
            self.y = (np.arange(self.y.shape[1]) == self.y.argmax(1)[:, None]).astype(float)
        self.objective = Objective(self.model)
        self.weights, self.state = self.objective.weights(), self.objective.state()
        self.args = array(self.x, None if case.integers else dtype), array(self.y, dtype)

    def point(self, *vector):
        """Return the arguments of a differentiated objective."""
        return self.weights, *vector, self.state, Batch(*self.args)

    def example_losses(self, weights, state, x, y, training=True):
        """Return the losses of the examples, a function for `backend.jacobian`."""
        with self.objective.at(weights, state, training) as (predict, _):
            return keras.ops.cast(self.keras_losses(y, predict(x)), backend.widest_float())

    def masks(self, sizes):
        """Return the masks of successive draws, of `sizes` examples each."""
        with self.objective.at(self.weights, self.state, training=True):
            dropout = self.model.get_layer("dropout")
            ones = [keras.ops.ones((size, *self.case.shape)) for size in sizes]
            return [numpy(dropout(x, training=True)) for x in ones]

    def numpy_parts(self, sizes):
        """Return functions `weights -> losses` of contiguous parts of the batch."""
        stops = np.cumsum(sizes)
        masks = self.masks(sizes) if self.case.drops else [None] * len(sizes)
        return [
            self.numpy_function(slice(stop - size, stop), mask)
            for stop, size, mask in zip(stops, sizes, masks)
        ]

    def numpy_function(self, rows, mask=None, forward=None):
        forward = forward or self.case.forward
        extra = [] if mask is None else [mask]

        def losses(weights):
            return self.numpy_losses(self.y[rows], forward(weights, self.x[rows], *extra))

        return losses

    def numpy_losses_of_batch(self):
        return self.numpy_parts([len(self.x)])[0]


def draw(rng, shape):
    return np.asarray(rng.normal(scale=0.7, size=shape), "float32").astype("float64")


@pytest.fixture(autouse=True)
def fast_compilation():
    """Let XLA spend less time on programs that run once."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def xla_options():
    """Return what makes XLA compile faster by a third, where this version of it knows it."""
    import jax

    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options)(1.0)
    except Exception:
        return None
    return options


def at_once(function, *args):
    """Call a function, on JAX as one program: it would compile every operation by itself."""
    if BACKEND == "jax":
        import jax

        function = jax.jit(function, compiler_options=xla_options())
    return function(*args)


def mean_of(losses):
    return lambda weights: losses(weights).mean()


def flat(arrays, like=None):
    """Concatenate arrays; `None` counts as zeros of the shape in `like`."""
    like = arrays if like is None else like
    parts = [np.zeros(b.shape) if a is None else numpy(a) for a, b in zip(arrays, like)]
    assert [p.shape for p in parts] == [tuple(b.shape) for b in like]
    return np.concatenate([p.ravel() for p in parts]).astype("float64")


def assert_close(got, expected, tolerance):
    """Compare lists of arrays, or numbers, in norm."""
    if isinstance(expected, list):
        got, expected = flat(got, expected), flat(expected)
    assert np.linalg.norm(expected) > 1e-3, "the oracle shows nothing"
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def random_vector(net):
    rng = np.random.default_rng(1)
    return [draw(rng, w.shape) for w in net.points]


# Every layer


@each(CASES)
def test_value_and_gradient(float64, case):
    net = Net(case)
    (value, _), gradients = at_once(backend.value_and_grad(net.objective), *net.point())
    loss = mean_of(net.numpy_losses_of_batch())
    assert_close(numpy(value), loss(net.points), case.tolerance(ROUNDING))
    assert_close(gradients, oracle.derivative(loss, net.points), case.tolerance(ROUNDING))


@each(CASES)
def test_hessian_vector_product_with_the_gradient_and_with_a_given_vector(float64, case):
    net = Net(case)
    assert_products(net, net.objective, mean_of(net.numpy_losses_of_batch()), case.tolerance)


def assert_products(net, function, loss, tolerance):
    product = backend.hessian_vector_product(function)
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


@each(CASES)
def test_gradients_of_each_example_through_the_whole_batch(float64, case):
    net = Net(case)
    jacobian = backend.jacobian(net.example_losses, coupled=True)
    values, rows = jacobian(net.weights, net.state, *net.args)
    losses = net.numpy_losses_of_batch()
    assert_close(numpy(values), losses(net.points), case.tolerance(ROUNDING))
    assert_close(rows, oracle.derivative(losses, net.points), case.tolerance(ROUNDING))


@each([case for case in CASES if not case.couples])
def test_gradients_of_each_example_by_itself(float64, case):
    net = Net(case)
    jacobian = backend.jacobian(net.example_losses, coupled=False)
    values, rows = jacobian(net.weights, net.state, *net.args)
    mask = net.masks([1])[0] if case.drops else None  # every example starts from the same state
    losses = net.numpy_function(slice(None), mask)
    assert_close(numpy(values), losses(net.points), case.tolerance(ROUNDING))
    assert_close(rows, oracle.derivative(losses, net.points), case.tolerance(ROUNDING))


@each(CASES)
def test_sub_batches_by_either_estimator(float64, case):
    net = Net(case)
    finite, products = regularize(net, *ESTIMATORS)
    parts = [mean_of(part) for part in net.numpy_parts(SIZES)]
    assert_averages(case, finite, [finite_difference(p, net.points) for p in parts], DIFFERENCE)
    assert_averages(case, products, [curvature(p, net.points) for p in parts], STENCIL)


def regularize(net, *estimators, alpha=ALPHA):
    """Return the value, the gradient and the gradient of the loss, by each of the estimators."""

    def averages(*batch):
        results = [
            SubBatchPerturbation(alpha, 1.0, len(SIZES), "sub_batches", estimator=estimator)(
                net.objective, Batch(*batch)
            )
            for estimator in estimators
        ]
        return [(r.value, r.gradient, r.loss_gradient) for r in results]

    return at_once(averages, *net.args)


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
    for coupled in (False, True):
        _, rows = backend.jacobian(inference, coupled)(net.weights, net.state, *net.args)
        assert_close(rows, expected, ROUNDING)


@each([NAMED["batch_norm"], NAMED["dropout"]])
def test_auxiliary_is_that_of_the_function(float64, case):
    net = Net(case)
    (_, expected), ((_, first), _), ((_, second), _, _) = at_once(
        lambda weights, state, batch: (
            net.objective(weights, state, batch),
            backend.value_and_grad(net.objective)(weights, state, batch),
            backend.hessian_vector_product(net.objective)(weights, None, state, batch),
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
    product = backend.hessian_vector_product(net.objective)
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
    product = tf.function(backend.hessian_vector_product(net.objective), autograph=False)
    _, _, products = product(*net.point([array(v) for v in vector]))
    loss = mean_of(net.numpy_losses_of_batch())
    assert_close(products, oracle.hessian_vector_product(loss, net.points, vector), STENCIL)


# What a function does not depend on. The weights are u, v and w.


def cube_of_the_second(weights, *args):
    return keras.ops.sum(weights[1] ** 3), None


@pytest.fixture
def three_weights(float64):
    return [np.array([1.0, 2.0]), np.array([0.5, -1.0, 2.0]), np.array([[3.0]])]


def as_arrays(values):
    return [array(v) for v in values]


def test_gradients_by_weights_that_the_value_does_not_depend_on(three_weights):
    (_, _), gradients = backend.value_and_grad(cube_of_the_second)(as_arrays(three_weights))
    assert_only_second(gradients, 3 * three_weights[1] ** 2)


@pytest.mark.parametrize("given", [False, True], ids=["gradient", "vector"])
def test_products_by_weights_that_the_value_does_not_depend_on(three_weights, given):
    vector = [np.ones_like(w) for w in three_weights]
    direction = vector[1] if given else 3 * three_weights[1] ** 2
    _, gradients, products = backend.hessian_vector_product(cube_of_the_second)(
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

    _, gradients, products = backend.hessian_vector_product(linear)(as_arrays(three_weights), None)
    np.testing.assert_array_equal(flat(gradients, three_weights), 1)
    np.testing.assert_array_equal(flat(products, three_weights), 0)


@pytest.mark.parametrize("coupled", [False, True], ids=["by_example", "whole"])
def test_rows_of_weights_that_the_values_do_not_depend_on_are_zero(three_weights, coupled):
    def values(weights, context, x):
        return x * cube_of_the_second(weights)[0]

    jacobian = backend.jacobian(values, coupled)
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
    product = backend.hessian_vector_product(constant)
    _, gradients, products = product(as_arrays(three_weights), None)
    assert not np.any(flat(gradients, three_weights))
    assert not np.any(flat(products, three_weights))


@pytest.mark.parametrize("coupled", [False, True], ids=["by_example", "whole"])
def test_rows_of_values_that_depend_on_no_weight_are_zero(three_weights, coupled):
    jacobian = backend.jacobian(lambda weights, context, x: x, coupled)
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
@pytest.mark.parametrize("coupled", [False, True], ids=["by_example", "whole"])
def test_jacobian_follows_weights_state_and_data(float64, coupled, compiled):
    net = Net(NAMED["dense"])
    jacobian = backend.jacobian(net.example_losses, coupled, compiled)
    jacobian(net.weights, net.state, *net.args)
    net.points = [2 * w for w in net.points]
    net.x, net.y = net.x[::-1].copy(), net.y[::-1].copy()
    _, rows = jacobian(as_arrays(net.points), net.state, array(net.x), array(net.y))
    assert_close(rows, oracle.derivative(net.numpy_losses_of_batch(), net.points), ROUNDING)


def test_jacobian_follows_the_context(float64):
    net = Net(NAMED["batch_norm"])
    jacobian = backend.jacobian(functools.partial(net.example_losses, training=False), False)
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


# What is left as it was


def all_primitives(net):
    """Take every derivative of a network once."""
    at_once(backend.value_and_grad(net.objective), *net.point())
    at_once(backend.hessian_vector_product(net.objective), *net.point(None))
    for coupled in (False, True):
        backend.jacobian(net.example_losses, coupled)(net.weights, net.state, *net.args)


def test_variables_are_left_as_they_were():
    net = Net(dataclasses.replace(NAMED["batch_norm"], layers=dropped_and_normalized), "float32")
    before = [numpy(v).copy() for v in net.model.variables]
    all_primitives(net)
    for variable, value in zip(net.model.variables, before):
        np.testing.assert_array_equal(numpy(variable), value)


def test_sub_batches_draw_masks_of_their_own(float64):
    first, second = Net(NAMED["dropout"]).masks([4, 4])
    assert np.any(first != second)
    assert set(np.unique(first)) == {0.0, 2.0}


def replaced_functions():
    """Return what the TensorFlow backend replaces for second derivatives."""
    import tensorflow as tf

    return [tf.nn.moments, tf.image.resize]


@on_tensorflow
@each(NORMALIZATIONS)
def test_replaced_functions_are_restored(case):
    before = replaced_functions()
    net = Net(case, "float32")
    backend.hessian_vector_product(net.objective)(*net.point(None))
    assert replaced_functions() == before


@on_tensorflow
def test_replaced_functions_are_restored_after_an_exception():
    import tensorflow as tf

    before = replaced_functions()
    during = []

    def fails(weights):
        during.extend(replaced_functions())
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        backend.hessian_vector_product(fails)([tf.ones(2)], None)
    assert not set(during) & set(before)
    assert replaced_functions() == before


@on_tensorflow
def test_replaced_functions_are_restored_by_threads_that_leave_in_the_order_they_came():
    import tensorflow as tf

    before = replaced_functions()
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first(weights):
        assert second_is_in.wait(60)
        return tf.reduce_sum(weights[0] ** 3), None

    def second(weights):
        second_is_in.set()
        assert first_is_out.wait(60)
        # Still replaced, although the thread that came first has left.
        assert not set(replaced_functions()) & set(before)
        return tf.reduce_sum(weights[0] ** 3), None

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        arguments = [tf.ones(2)], None
        leaving = pool.submit(backend.hessian_vector_product(first), *arguments)
        staying = pool.submit(backend.hessian_vector_product(second), *arguments)
        leaving.result()
        first_is_out.set()
        staying.result()
    assert replaced_functions() == before


@on_torch
@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_parameters_keep_their_grad_and_requires_grad(recording):
    import torch

    net = Net(NAMED["dense"], "float32")
    parameters = [v.value for v in net.model.trainable_variables]
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    parameters[1].requires_grad_(False)
    before = [(p.grad, p.requires_grad) for p in parameters]
    with torch.set_grad_enabled(recording):
        all_primitives(net)
        regularize(net, *ESTIMATORS)
        assert torch.is_grad_enabled() == recording
    assert all(p.grad is g and p.requires_grad == r for p, (g, r) in zip(parameters, before))
    assert torch.all(parameters[0].grad == 7.0)


@on_torch
def test_results_hold_no_graph():
    net = Net(NAMED["dense"], "float32")
    results = [
        backend.value_and_grad(net.objective)(*net.point()),
        backend.hessian_vector_product(net.objective)(*net.point(None)),
        backend.jacobian(net.example_losses, True)(net.weights, net.state, *net.args),
        backend.jacobian(net.example_losses, False)(net.weights, net.state, *net.args),
    ]
    assert not any(a.requires_grad for a in keras.tree.flatten(results))


@on_torch
def test_generator_is_left_as_it_was():
    import torch

    net = Net(NAMED["unseeded_dropout"], "float32")
    before = torch.get_rng_state()
    all_primitives(net)
    regularize(net, *ESTIMATORS)
    assert torch.equal(torch.get_rng_state(), before)


@on_torch
def test_generator_is_left_as_it_was_after_an_exception():
    import torch

    net = Net(NAMED["unseeded_dropout"], "float32")

    def fails(weights, state, batch):
        net.objective(weights, state, batch)
        with net.objective.at(weights, state, training=True) as (predict, _):
            predict(batch.x)
            raise ArithmeticError

    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        backend.value_and_grad(fails)(*net.point())
    assert torch.equal(torch.get_rng_state(), before)


@each([case for case in CASES if case.drops])
def test_both_evaluations_of_a_pair_see_the_same_mask(float64, case):
    net = Net(case)
    [(_, gradient, loss_gradient)] = regularize(net, "finite_difference", alpha=1e-9)
    # alpha times H g, against a difference of the order of g if the masks differed.
    assert np.linalg.norm(flat(loss_gradient)) > 0.1
    assert np.linalg.norm(flat(gradient)) < 1e-7


# ---------------------------------------------------------------- devices, order and float64


def test_float64_within_a_compiled_function():
    """Products of float32 numbers are exact in float64, and rounded outside of it."""
    numbers = np.array([1 + 2**-12, 3.0], "float32")

    def squares(x):
        with backend.float64_allowed():
            x = keras.ops.cast(x, "float64")
            return x * x

    result = numpy(backend.compiled(squares)(array(numbers)))
    assert result.dtype == "float64"
    np.testing.assert_array_equal(result, numbers.astype("float64") ** 2)


def test_an_array_after_another_is_the_array():
    function = backend.compiled(lambda x, y: backend.after(x, y + 1.0))
    np.testing.assert_array_equal(numpy(function(array([1.0, 2.0]), array([3.0]))), [1.0, 2.0])


def test_numbers_at_hand_are_not_traced():
    assert not backend.is_traced(array([1.0]))


@only_on("tensorflow", "jax", reason="torch compiles nothing here")
def test_numbers_of_a_compiled_function_are_traced():
    seen = []
    backend.compiled(lambda x: (seen.append(backend.is_traced(x)), x)[1])(array([1.0]))
    assert seen == [True]


def test_no_device_is_the_usual_one():
    assert numpy(backend.on_device(None, lambda x: x + 1.0, array(1.0))) == 2.0


# --------------------------------------------------------------------------------- replicas


def test_one_device_is_one_replica_and_the_chief():
    model = Net(NAMED["dense"], "float32").model
    assert backend.num_replicas(model) == backend.num_parallel_steps(model) == 1
    assert backend.is_chief(model)
    backend.wait_for_workers(model)
    assert backend.own_batch(model, iterator=None) is None


def test_one_replica_keeps_what_is_its_own():
    model = Net(NAMED["dense"], "float32").model
    assert backend.reducible(model, len) is len
    means, predictions = backend.over_replicas(lambda batch: (batch[0] + 1, batch[1]))((1, 2))
    assert (means, predictions) == (2, 2)
    np.testing.assert_array_equal(numpy(backend.mean_over_steps(array([3.0, 4.0]))), [3.0, 4.0])
