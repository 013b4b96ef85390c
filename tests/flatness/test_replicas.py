"""Trials of gamma-hat on several devices."""

import keras
import numpy as np
import pytest
from frameworks import only_on
from keras import layers

from keras_infomcr import GammaHatCallback, backend
from keras_infomcr.flatness import gamma_hat


def network():
    """Return a compiled model, half of whose layers are tapped."""
    stack = [layers.Reshape((4, 4, 4)), layers.Conv2D(6, 3), layers.BatchNormalization()]
    stack += [layers.LayerNormalization(), layers.Flatten(), layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *stack])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


SETTINGS = {"num_examples": 20, "num_trials": 5, "seed": 0}


@pytest.mark.slow
def test_mirrored_strategy_gives_the_same_trials(mirrored, digits):
    with mirrored.scope():
        model = network()
    assert len(backend.devices(model)) == 2
    callback = GammaHatCallback(digits, **SETTINGS)
    model.fit(*digits, batch_size=300, epochs=2, callbacks=[callback], verbose=0)
    single = network()
    single.set_weights(model.get_weights())
    expected = gamma_hat(single, *digits, **SETTINGS)
    np.testing.assert_allclose(gamma_hat(model, *digits, **SETTINGS).trials, expected.trials, 1e-9)
    np.testing.assert_allclose(callback.result.trials, expected.trials, 1e-9)


def test_mirrored_strategy_stops_at_the_same_trial(mirrored, digits):
    with mirrored.scope():
        model = network()
    single = network()
    single.set_weights(model.get_weights())
    settings = SETTINGS | {"num_trials": "auto", "relative_tolerance": 0.02}
    result, expected = (gamma_hat(m, *digits, **settings) for m in (model, single))
    assert len(expected.trials) < 100
    np.testing.assert_allclose(result.trials, expected.trials, 1e-9)


@only_on("jax", reason="`keras.distribution` is JAX's")
def test_data_parallelism_gives_the_same_trials(digits):
    x, y = digits
    single = network()
    expected = gamma_hat(single, x, y, **SETTINGS)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        model = network()
        model.set_weights(single.get_weights())
        assert len(backend.devices(model)) == 4
        result = gamma_hat(model, x, y, **SETTINGS)
        callback = GammaHatCallback((x, y), **SETTINGS)
        model.fit(x[:1500], y[:1500], batch_size=300, callbacks=[callback], verbose=0)
        weights = model.get_weights()
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(result.trials, expected.trials, 1e-9)
    single.set_weights(weights)
    expected = gamma_hat(single, x, y, **SETTINGS)
    np.testing.assert_allclose(callback.result.trials, expected.trials, 1e-9)


def test_one_device_has_no_name():
    assert backend.devices(network()) == [None]
