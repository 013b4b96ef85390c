"""A second measurement of a model compiles nothing, and what is compiled dies with the model."""

import gc
import weakref

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import layers
from nets import NUM_CLASSES, from_logits

from keras_infomcr.flatness import (
    fisher_frobenius_norm,
    fisher_rao_norm,
    fisher_spectral_radius,
    fisher_trace,
    gamma,
    gamma_hat,
    gamma_hat_by_layer,
    input_jacobian_norm,
    relative_flatness,
)

pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")

DRAW = {"num_examples": 5, "num_trials": 2, "seed": 0}
MEASURES = {
    "gamma_hat": (gamma_hat, DRAW),
    "normalised": (gamma_hat, DRAW | {"normalize_softmax": True}),
    "training": (gamma_hat, DRAW | {"training": True}),
    "gamma": (gamma, DRAW),
    "by layer": (gamma_hat_by_layer, DRAW),
    "trace": (fisher_trace, DRAW),
    "spectral radius": (fisher_spectral_radius, DRAW),
    "frobenius norm": (fisher_frobenius_norm, DRAW),
    "input jacobian": (input_jacobian_norm, {"num_examples": 12, "chunk_size": 6, "seed": 0}),
    "fisher-rao norm": (fisher_rao_norm, {"num_examples": 12, "chunk_size": 6, "seed": 0}),
    "relative flatness": (relative_flatness, DRAW | {"num_products": 6}),
}
# They share what is compiled for gamma-hat and the trace: CI alone tries them.
SLOW = (
    "normalised",
    "training",
    "gamma",
    "by layer",
    "spectral radius",
    "frobenius norm",
    "fisher-rao norm",
    "relative flatness",
)
PARAMS = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
    for name, case in MEASURES.items()
]
measures = pytest.mark.parametrize(("measure", "settings"), PARAMS)
only_compiled = pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing here")


class Counting(layers.Dense):
    """Counts the calls of its Python code: where it is traced, and where it runs eagerly."""

    count = 0

    def call(self, inputs):
        Counting.count += 1
        return super().call(inputs)


def counting(**kwargs):
    model = keras.Sequential([keras.Input((6,)), Counting(8, "tanh"), layers.Dense(NUM_CLASSES)])
    model.compile("sgd", from_logits(), **kwargs)
    return model


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


def numbers(result):
    return result.values if hasattr(result, "values") else result.samples


def traced(measure, model, data, **settings):
    """Return the result and how often the Python code of a layer ran."""
    before = Counting.count
    result = measure(model, *data, **settings)
    return numbers(result), Counting.count - before


@only_compiled
@measures
def test_other_data_compile_nothing(data, measure, settings):
    x, y = data
    model = counting()
    first, count = traced(measure, model, data, **settings)
    assert count > 0
    weights = model.get_weights()
    model.set_weights([2 * w for w in weights])
    # Fewer of them, and at other weights.
    changed, count = traced(measure, model, (x[:12] + 1, y[:12]), **settings)
    assert count == 0
    other = counting()
    other.set_weights(model.get_weights())
    np.testing.assert_allclose(changed, numbers(measure(other, x[:12] + 1, y[:12], **settings)))
    model.set_weights(weights)
    again, count = traced(measure, model, data, **settings)
    assert count == 0
    np.testing.assert_array_equal(again, first)


@only_compiled
def test_measures_of_the_same_gradients_share_what_is_compiled(data):
    model = counting()
    traced(gamma_hat, model, data, **DRAW)
    for measure in (gamma, gamma_hat_by_layer, fisher_trace, fisher_spectral_radius):
        # Another draw and number of trials, too.
        _, count = traced(measure, model, data, num_examples=5, num_trials=3, seed=1)
        assert count == 0


@pytest.mark.slow
def test_what_is_compiled_follows_the_model(data):
    """Another loss, other trainable weights, other settings and another form of labels."""
    model = counting()
    first = numbers(gamma_hat(model, *data, **DRAW))

    def assert_as_new(y=data[1], **settings):
        other = counting()
        other.layers[0].trainable = model.layers[0].trainable
        other.compile("sgd", model.loss)
        other.set_weights(model.get_weights())
        found, expected = (
            numbers(gamma_hat(m, data[0], y, **DRAW | settings)) for m in (model, other)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        return found

    assert not np.allclose(assert_as_new(num_examples=3), first, rtol=1e-3)
    assert not np.allclose(assert_as_new(normalize_softmax=True), first, rtol=1e-3)
    half = assert_as_new(normalize_softmax=True, softmax_scale=0.02)
    assert not np.allclose(half, assert_as_new(normalize_softmax=True), rtol=1e-3)
    one_hot = np.eye(NUM_CLASSES)[data[1]]
    np.testing.assert_allclose(assert_as_new(one_hot), first, rtol=1e-6)
    model.layers[0].trainable = False
    assert not np.allclose(assert_as_new(), first, rtol=1e-3)
    model.layers[0].trainable = True
    model.compile("sgd", keras.losses.CategoricalFocalCrossentropy(from_logits=True))
    assert not np.allclose(assert_as_new(one_hot), first, rtol=1e-3)


def test_a_warning_of_probabilities_is_given_by_each_measurement(data):
    stack = [layers.Dense(NUM_CLASSES, "softmax"), layers.Rescaling(1.0)]
    model = keras.Sequential([keras.Input((6,)), *stack])
    model.compile("sgd", "sparse_categorical_crossentropy")
    for _ in range(2):
        with pytest.warns(UserWarning, match="does not end in a softmax or sigmoid"):
            fisher_trace(model, *data, **DRAW)


@pytest.mark.parametrize("run_eagerly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_measured_model_is_collected(data, run_eagerly):
    model = counting(run_eagerly=run_eagerly)
    gamma_hat(model, *data, **DRAW)
    gamma_hat(model, *data, **DRAW, loss=from_logits())
    fisher_trace(model, *data, **DRAW, training=True)
    input_jacobian_norm(model, *data)
    alive = weakref.ref(model)
    del model
    gc.collect()
    gc.collect()  # also what objects with finalizers, such as TensorFlow's graphs, have held
    assert alive() is None
