"""What is compiled for a model is kept as long as the model lives, and no longer."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy
from keras import layers
from parameters import slow_but

from keras_infomcr import flatness
from keras_infomcr.flatness import Hessian, hessian_trace
from keras_infomcr.flatness.running.compiled_for import compiled_for

NUM_CLASSES = 4


class Counting(layers.Dense):
    """Counts how often Python runs its `call`: where it is traced, and on torch always."""

    calls = 0

    def call(self, inputs):
        self.calls += 1
        return super().call(inputs)


def counting():
    model = keras.Sequential([keras.Input((6,)), Counting(NUM_CLASSES)])
    return recompiled(model)


def recompiled(model, **settings):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, **settings)
    return model


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def short(name, **settings):
    return functools.partial(getattr(flatness, name), seed=0, **settings)


MEASURES = [
    short("hessian_trace", num_products=6),
    short("hessian_spectral_radius"),
    short("local_energy", num_samples=1, reestimate=True),
    short("local_entropy", num_samples=1),
    short("adaptive_sharpness", num_steps=1),
]


def named(measure):
    return measure.func.__name__


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing here")
@pytest.mark.parametrize("measure", MEASURES, ids=named)
def test_a_second_measurement_compiles_nothing(data, measure):
    model = counting()
    first = measure(model, *data).value
    traced = model.layers[0].calls
    assert traced > 0
    assert measure(model, *data).value == first
    assert model.layers[0].calls == traced


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing here")
def test_methods_of_a_hessian_and_functions_share_what_is_compiled(data):
    model = counting()
    hessian = Hessian(model, *data, seed=0)
    hessian.trace(num_products=30)
    traced = model.layers[0].calls
    hessian.frobenius_norm(num_products=30)
    hessian_trace(model, *data, seed=1)
    assert model.layers[0].calls == traced
    Hessian(model, *data, training=True).trace()  # another graph
    assert model.layers[0].calls > traced


@pytest.mark.parametrize("measure", slow_but(MEASURES, MEASURES[0], MEASURES[3]), ids=named)
def test_models_that_were_measured_are_freed(data, measure):
    model = counting()
    measure(model, *data, loss=lambda y, p: keras.ops.mean(p**2, axis=-1))
    measure(model, *data)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_training_goes_on_and_is_measured(data):
    model, fresh = counting(), counting()
    before = hessian_trace(model, *data, seed=0).value
    model.fit(*data, epochs=3, verbose=0)
    fresh.set_weights(model.get_weights())
    after = hessian_trace(model, *data, seed=0).value
    assert after == pytest.approx(hessian_trace(fresh, *data, seed=0).value, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("weight", [3.0, 0.5])
def test_a_model_compiled_again_is_measured_as_it_is(data, weight):
    """By its name the loss would be the same."""
    model, y = counting(), np.eye(NUM_CLASSES)[data[1]]
    model.compile("sgd", "mse")
    once = hessian_trace(model, data[0], y, seed=0).value
    model.compile("sgd", "mse", loss_weights=[weight])
    found = hessian_trace(model, data[0], y, seed=0).value
    assert found == pytest.approx(weight * once, rel=1e-5)


def test_what_changes_a_model_makes_anew():
    model, made = counting(), []

    def make():
        made.append(1)
        return len(made)

    def found(key="key"):
        return compiled_for(model, key, make)

    assert found() == found() == 1
    assert found("other") == 2 and found() == 1
    recompiled(model)
    assert found() == found() == 3
    model.layers[0].trainable = False
    assert found() == 4
    model.layers[0].trainable = True
    recompiled(model, run_eagerly=True)
    assert found() == found() == 5
    model.run_eagerly = False
    assert found() == 6


def test_keys_that_are_always_new_do_not_pile_up():
    model, results = counting(), []

    class Result:
        pass

    def make():
        result = Result()
        results.append(weakref.ref(result))
        return result

    for key in range(100):
        compiled_for(model, "often", Result)
        compiled_for(model, key, make)
    gc.collect()
    assert sum(r() is not None for r in results) < 40
    often = compiled_for(model, "often", Result)
    assert compiled_for(model, "often", make) is often


def test_a_measured_model_is_saved_cloned_and_counted_as_before(data, tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(NUM_CLASSES)])
    recompiled(model)
    before = len(model.variables), len(model.layers), model.get_config()
    given = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    hessian_trace(model, *data, loss=given)
    assert (len(model.variables), len(model.layers), model.get_config()) == before
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(loaded.variables, model.variables):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
    plain = keras.models.clone_model(model)
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(plain.get_weights()[0], model.get_weights()[0])


def test_compiling_without_a_loss_makes_anew():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    model.compile("sgd")
    first = compiled_for(model, "key", object)
    assert compiled_for(model, "key", object) is first
    model.compile("sgd")
    assert compiled_for(model, "key", object) is not first


def test_freezing_a_layer_without_weights_makes_anew():
    """Batch normalisation takes its moving statistics then."""
    layer = layers.BatchNormalization(center=False, scale=False)
    model = recompiled(keras.Sequential([keras.Input((6,)), layers.Dense(NUM_CLASSES), layer]))
    first = compiled_for(model, "key", object)
    layer.trainable = False
    assert compiled_for(model, "key", object) is not first
