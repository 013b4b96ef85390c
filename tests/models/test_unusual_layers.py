"""Layers that assign weights, draw, compute again or are quantised, in the regularised step.

`check_training` compares with the literal reading of Algorithm 1. Its module, `literal_reading.py`,
says where the tolerances come from.
"""

import random

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, gradients, numpy, only_on, slices
from literal_reading import check_training
from parameters import slow_but
from small_nets import EAGER, X, Y, compiling, fitting

from keras_infomcr import RegularizedModel, flatness
from keras_infomcr.regularizers import SubBatchPerturbation

ALPHA, BETA, RATE = 0.05, 2.0, 1 / 8


def rematerialized(base):
    inputs = keras.Input((4,))
    with keras.RematScope("full"):
        hidden = keras.layers.Dense(5, "tanh")(inputs)
        hidden = keras.layers.BatchNormalization()(hidden)
    return base(inputs, keras.layers.Dense(2)(hidden))


def rematerialized_by_example(base):
    inputs = keras.Input((4,))
    with keras.RematScope("full"):
        return base(inputs, keras.layers.Dense(2)(keras.layers.Dense(5, "tanh")(inputs)))


@only_on(
    "tensorflow",
    "torch",
    reason="On JAX, Keras cannot call batch normalisation that is computed again.",
)
@pytest.mark.usefixtures("float64")
def test_layers_that_are_computed_again_in_the_backward_pass():
    # Compiled by TensorFlow, Keras cannot train them.
    check_training(rematerialized, fitting(), compiling(**EAGER))


@pytest.mark.usefixtures("float64")
def test_main_gradient_of_layers_that_are_computed_again_in_the_backward_pass():
    check_training(rematerialized_by_example, fitting(), compiling(**EAGER), "auto")


class ComputedAgain(keras.layers.Layer):
    """As the documentation of `keras.remat` has it."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4, "tanh")
        self.again = keras.remat(self.dense)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        return self.again(inputs)


@only_on("tensorflow", reason="On JAX and torch, such functions see the weights of the evaluation.")
def test_functions_that_hide_weights_are_refused():
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(ComputedAgain()(inputs)))
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"no gradient by \['computed_again/dense.*RematScope"):
        model.fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


class Experts(keras.layers.Layer):
    """Its second layer acts only where an example needs it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(2), keras.layers.Dense(2)

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def compute_output_shape(self, shape):
        return shape[0], 2

    def call(self, inputs):
        needed = inputs[:, :1] > 0
        if bool(keras.ops.any(needed)):
            return keras.ops.where(needed, self.second(inputs), self.first(inputs))
        return self.first(inputs)


@only_on("tensorflow", "torch", reason="On JAX, Python cannot choose by the values of traced data.")
@pytest.mark.usefixtures("float64")
def test_layers_that_only_some_sub_batches_reach():
    x = np.concatenate([np.abs(X[:3]), -np.abs(X[:3])])  # the second sub-batch does without

    def build(base):
        inputs = keras.Input((4,))
        return base(inputs, Experts()(inputs))

    check_training(build, fitting(x, batch_size=6), compiling(**EAGER))


@only_on("torch", reason="`torch.utils.checkpoint` is a part of torch.")
def test_checkpoints_that_were_imported_by_name(rng):
    from torch.utils.checkpoint import checkpoint

    class Again(keras.layers.Dense):
        def call(self, inputs, training=None):
            return checkpoint(super().call, inputs, use_reentrant=False)

    weights = []
    for layer in (Again, keras.layers.Dense):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        model = RegularizedModel(inputs, keras.layers.Dense(2)(layer(5, "tanh")(inputs)))
        regularizer = SubBatchPerturbation(0.5, BETA, 2)
        model.compile(keras.optimizers.SGD(RATE), "mse", regularizer=regularizer)
        model.fit(X, Y, epochs=3, shuffle=False, verbose=0)
        weights.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    # The same operations: rounding of float32.
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-6)


def spectral(main_gradient):
    """Return a model of one layer that assigns its kernel, and that layer; squared error."""
    keras.utils.set_random_seed(1)
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(2, use_bias=False))
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, layer(inputs))
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2, main_gradient)
    model.compile(keras.optimizers.SGD(RATE), "mse", regularizer=regularizer)
    return model, layer


@pytest.mark.usefixtures("float64")
def test_a_layer_that_assigns_its_weights_does_so_once_a_step():
    """The pair starts from the weights and the state that the main pass has left."""
    _, layer = spectral("full_batch")
    twin, twin_layer = spectral("full_batch")
    kernel, x, y = layer.layer.kernel, X.astype("float64"), Y.astype("float64")

    def squared_error(rows):
        # Keras's step keeps what the layer assigns but on JAX, where it is a part of the loss.
        weights = kernel if BACKEND != "jax" else layer.normalized_weights()[1]
        outputs = keras.ops.matmul(array(x[rows]), weights)
        return keras.ops.mean((outputs - array(y[rows])) ** 2), None

    def gradient(rows):
        return numpy(gradients(lambda: squared_error(rows), [kernel])[2][0])

    # What the main pass leaves, by plain Keras.
    if BACKEND == "jax":
        start = kernel.numpy()
        everything = gradient(np.arange(len(x)))
        layer.vector_u.assign(layer.normalized_weights()[0])
    else:
        layer(x, training=True)
        start = kernel.numpy()
        everything = gradient(np.arange(len(x)))
    contribution = 0.0
    for rows in slices(len(x), 2):
        here = gradient(rows)
        kernel.assign(start - ALPHA * here)
        there = gradient(rows)
        kernel.assign(start)
        contribution = contribution + len(rows) / len(x) * (here - there)
    expected = start - RATE * (everything + BETA * contribution)

    twin.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    # Exact but for rounding: numbers of order one, a hundred operations on each at most.
    assert np.abs(RATE * BETA * contribution).max() > 1e-3
    np.testing.assert_allclose(numpy(twin_layer.layer.kernel), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        numpy(twin_layer.vector_u), numpy(layer.vector_u), rtol=0, atol=1e-12
    )


def test_sub_batches_of_a_layer_that_assigns_its_weights_are_refused():
    model, _ = spectral("sub_batches")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"must see whole batches.*kernel.*full_batch"):
        model.fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


class Centring(keras.layers.Layer):
    """Assigns variables when it is called, and gives what depends on them."""

    def build(self, shape):
        self.centre = self.add_weight(shape=shape[1:], initializer="ones", trainable=False)
        self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False)

    def call(self, inputs, training=False):
        if training:
            mean = keras.ops.mean(inputs, axis=0)
            self.centre.assign((self.centre + mean) / 2)
            self.calls.assign(self.calls + 1)
        return inputs - self.centre


@pytest.mark.usefixtures("float64")
def test_a_layer_that_assigns_its_state_does_so_once_a_step():
    def build(base):
        inputs = keras.Input((4,))
        hidden = Centring()(keras.layers.Dense(5, "tanh")(inputs))
        return base(inputs, keras.layers.Dense(2)(hidden))

    model = check_training(build, fitting(), compiling(**EAGER))
    # Two calls of `fit`, two batches each.
    assert numpy(model.layers[2].calls) == 4


class HostNoise(keras.layers.Layer):
    """Adds noise that Python and NumPy draw: at each call, or while the call is traced."""

    def call(self, inputs):
        return inputs + (random.random() + np.random.default_rng(np.random.randint(99)).random())


@pytest.mark.parametrize("mode", slow_but([{}, EAGER], EAGER), ids=["compiled", "eager"])
@pytest.mark.parametrize("main_gradient", ["full_batch", "sub_batches"])
def test_a_pair_shares_what_python_and_numpy_draw(main_gradient, mode, float64):
    """With shared draws g - h is alpha H g, some 1e-7 of g at this alpha; else as large as g."""
    rules = [SubBatchPerturbation(1e-7, beta, 1, main_gradient) for beta in (0.0, 1.0)]
    if main_gradient == "full_batch":
        rules.append(None)  # plain Keras draws once a step, and so must a rule
    weights, drawn = [], []
    for regularizer in rules:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        model = RegularizedModel(inputs, keras.layers.Dense(2)(HostNoise()(inputs)))
        model.compile(keras.optimizers.SGD(RATE), "mse", regularizer=regularizer, **mode)
        keras.utils.set_random_seed(2)
        model.train_on_batch(X, Y)
        drawn.append((random.random(), np.random.random()))
        weights.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    assert 0 < np.max(np.abs(weights[1] - weights[0])) < 1e-5
    if main_gradient == "full_batch":
        np.testing.assert_array_equal(drawn[1], drawn[2])
        np.testing.assert_allclose(weights[0], weights[2], rtol=1e-12)


class Noise(keras.layers.Layer):
    """Draws by TensorFlow: directly, in a branch, in a function or from a generator."""

    def __init__(self, way):
        super().__init__(name="noise")
        self.way = way

    def call(self, inputs):
        import tensorflow as tf

        shape = tf.shape(inputs)
        if self.way == "branch":
            return tf.cond(
                tf.reduce_sum(inputs) < 1e9,
                lambda: inputs + tf.random.uniform(shape),
                lambda: inputs,
            )
        if self.way == "function":
            return tf.function(lambda a: a + tf.random.truncated_normal(shape))(inputs)
        if self.way == "generator":
            return inputs + tf.random.get_global_generator().normal(shape)
        return inputs + tf.random.normal(shape)


def noisy(way, **mode):
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(Noise(way)(inputs)))
    model.compile("sgd", "mse", **mode)
    return model


@only_on("tensorflow", reason="JAX has no hidden random state, and on torch a pair shares it.")
@pytest.mark.parametrize(
    ("way", "mode"),
    [
        pytest.param("direct", {}, id="direct-compiled"),
        pytest.param("direct", EAGER, id="direct-eager", marks=pytest.mark.slow),
        pytest.param("branch", {}, id="branch-compiled", marks=pytest.mark.slow),
        pytest.param("branch", EAGER, id="branch-eager"),
        pytest.param("function", {}, id="function-compiled", marks=pytest.mark.slow),
        pytest.param("function", EAGER, id="function-eager"),
        pytest.param("generator", {}, id="generator-compiled", marks=pytest.mark.slow),
        pytest.param("generator", EAGER, id="generator-eager"),
    ],
)
def test_layers_that_draw_by_tensorflow_are_refused(way, mode):
    model = noisy(way, **mode)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"keras.random.*SeedGenerator.*/noise"):
        model.fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    model.compile("sgd", "mse", regularizer=None)
    model.fit(X, Y, verbose=0)


@only_on("tensorflow", reason="JAX has no hidden random state, and on torch a pair shares it.")
@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
@pytest.mark.parametrize(
    "measure",
    [
        flatness.hessian_trace,
        flatness.local_energy,
        lambda *data: flatness.gamma_hat(*data, num_examples=2, num_trials=1),
    ],
    ids=["hessian_trace", "local_energy", "gamma_hat"],
)
def test_layers_that_draw_by_tensorflow_are_not_measured(measure):
    with pytest.raises(ValueError, match=r"keras.random.*SeedGenerator.*/noise"):
        measure(noisy("direct"), X, Y)


def quantized(policy):
    """Return a classifier of a frozen int8 layer between two others; logits."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "gelu"), keras.layers.Dense(8, "gelu"), keras.layers.Dense(3)]
    model = RegularizedModel.from_model(keras.Sequential([keras.Input((4,)), *layers]))
    layers[1].quantize("int8")
    for layer in layers:
        layer.dtype_policy = f"int8_from_{policy}" if layer is layers[1] else policy
    layers[1].trainable = False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(RATE), loss, regularizer=SubBatchPerturbation(ALPHA, BETA, 2)
    )
    return model


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(
            lambda *data: flatness.gamma_hat(*data, num_examples=5, num_trials=4, seed=0),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda *data: flatness.hessian_trace(*data, seed=0), marks=pytest.mark.slow),
    ],
    ids=["gamma_hat", "hessian_trace"],
)
def test_quantized_layers_stay_quantized_in_float32(rng, measure):
    """The model of half precision, evaluated in float32, is the model of float32.

    Both compute the same: rounding of float32, times the condition of ln|G|.
    """
    x, y = rng.normal(size=(20, 4)).astype("float32"), rng.integers(3, size=20)
    half, full = (measure(quantized(policy), x, y) for policy in ("mixed_bfloat16", "float32"))
    np.testing.assert_allclose(half.value, full.value, rtol=1e-4)


@pytest.mark.slow
def test_contribution_of_quantized_layers_is_that_of_float32(rng):
    x, y = rng.normal(size=(20, 4)).astype("float32"), rng.integers(3, size=20)
    values = []
    for policy in ("mixed_bfloat16", "float32"):
        history = quantized(policy).fit(x, y, batch_size=20, verbose=0).history
        values.append(history["infomcr_reg"][0])
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_float8_layers_are_refused(rng):
    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(keras.layers.Dense(3)(inputs)))
    for layer in model.layers[1:]:
        layer.quantize("float8")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"must not be quantised to float8.*inputs_scale"):
        model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match=r"must not be quantised to float8.*inputs_scale"):
        flatness.hessian_trace(model, X, Y)
