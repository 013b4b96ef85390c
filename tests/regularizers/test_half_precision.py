"""The regulariser is computed in float32 or float64, whatever the dtype policy."""

import functools

import keras
import numpy as np
import pytest
from algorithm_1 import flat
from frameworks import array
from gelu_networks import GeluNetwork, gelu_network

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation


@functools.cache
def contributions(build, policy):
    """Return the contribution as the regulariser gives it, and as a training step shows it."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(32, 12)).astype("float32"), generator.integers(4, size=32)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = build()
    model.build((None, 12))
    model.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=SubBatchPerturbation(num_sub_batches=2),
    )
    given = flat(model.regularizer(Objective(model), Batch(array(x), array(y)), []).gradient)
    initial, trained = model.get_weights(), []
    for beta in (0.0, 100.0):
        model.set_weights(initial)
        model.regularizer.beta = beta
        before = flat(model.trainable_variables)
        model.train_on_batch(x, y)
        trained.append(flat(model.trainable_variables))
        assert np.abs(trained[-1] - before).max() > 1e-3, "the step was skipped"
    return given, (trained[0] - trained[1]) / 100


@pytest.mark.slow
@pytest.mark.parametrize("build", [gelu_network, GeluNetwork])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_contributes_what_float32_does(build, policy):
    expected, expected_step = contributions(build, "float32")
    # Float32 rounds weights of order one by 1e-7, which is less than a thousandth of a
    # contribution of some 1e-3.
    assert np.linalg.norm(expected_step - expected) < 0.01 * np.linalg.norm(expected)
    for got in contributions(build, policy):
        norms = np.linalg.norm(got), np.linalg.norm(expected)
        assert got @ expected >= 0.99 * norms[0] * norms[1]
        np.testing.assert_allclose(*norms, rtol=0.05)


def test_dtype_policy_is_left_as_it_was():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = gelu_network()
    policies = [layer.dtype_policy for layer in model.layers]
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    model.train_on_batch(np.ones((4, 12)), np.ones((4, 4)))
    assert [layer.dtype_policy for layer in model.layers] == policies
    assert all(a.dtype_policy is b for a, b in zip(model.layers, policies))
    outputs = model.layers[1](np.ones((1, 12)))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


def test_overflow_skips_the_step_as_in_plain_keras(rng):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = rng.normal(size=(8, 12)).astype("float32"), rng.integers(4, size=8)
    model = gelu_network()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**40)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, regularizer=SubBatchPerturbation(num_sub_batches=2))
    before = flat(model.trainable_variables)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(flat(model.trainable_variables), before)
    assert float(optimizer.dynamic_scale) == 2.0**39


def test_half_precision_weights_are_refused():
    keras.config.set_dtype_policy("float16")
    model = gelu_network()
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    before = model.get_weights()
    message = r"Weights must be float32 or float64.*Received: half-precision weights \['dense/kern"
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(np.ones((4, 12)), np.ones((4, 4)))
    np.testing.assert_array_equal(flat(model.get_weights()), flat(before))


def test_half_precision_weights_that_come_later_are_refused():
    keras.config.set_dtype_policy("float16")

    class Net(RegularizedModel):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def call(self, inputs):
            return self.dense(inputs)

    model = Net()
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    with pytest.raises(ValueError, match="Weights must be float32 or float64"):
        model.fit(np.ones((4, 12)), np.ones((4, 4)), verbose=0)
