"""Training at weights with noise, against its formula with draws of Keras's own generator."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy, only_on
from keras import layers
from keras.optimizers import schedules

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Objective
from keras_infomcr.regularizers import WeightNoise

EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
draw = np.random.default_rng(5)
X = draw.normal(size=(6, 3))
Y = draw.normal(size=(6, 2))
KERNEL, BIAS = draw.normal(size=(3, 2)), draw.normal(size=2)


def linear(rule, rate=0.1, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = RegularizedModel(inputs, layers.Dense(2)(inputs))
    model.set_weights([KERNEL, BIAS])
    model.compile(keras.optimizers.SGD(rate), "mse", regularizer=rule, **EAGER | kwargs)
    return model


def gradients(kernel, bias):
    """Return the gradients of the mean over examples and outputs of (x W + b - y)^2."""
    error = (X @ kernel + bias - Y) / len(X)
    return X.T @ error, error.sum(axis=0)


def seed_of(seed):
    """Return the seed that the rule starts from, given the user's."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1


def filter_norms(kernel, per_filter):
    return np.linalg.norm(kernel, axis=0) if per_filter else np.linalg.norm(kernel)


@pytest.mark.parametrize("per_filter", [True, False])
@pytest.mark.parametrize("growth", [None, schedules.PolynomialDecay(1.0, 4, 5.0)])
def test_steps_follow_the_gradient_at_weights_with_noise(per_filter, growth, float64):
    generator = keras.random.SeedGenerator(seed_of(7))
    kernel, bias = KERNEL, BIAS
    for step in range(3):
        std = 0.2 * (1 + step if growth else 1)
        drawn = numpy(keras.random.normal((8,), dtype="float64", seed=generator))
        z = drawn[:6].reshape(3, 2), drawn[6:]
        there = (
            kernel + std * filter_norms(kernel, per_filter) * z[0],
            bias + std * np.linalg.norm(bias) * z[1],
        )
        kernel, bias = (w - 0.1 * g for w, g in zip((kernel, bias), gradients(*there)))
    model = linear(WeightNoise(0.2, per_filter, growth, seed=7))
    for _ in range(3):
        model.train_on_batch(X, Y)
    # Keras keeps the learning rate in float32, 1e-9 off; the steps are of order 0.1. A schedule is
    # computed in float32, too.
    for ours, expected in zip(model.get_weights(), (kernel, bias), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)


def noise_of(rule, count=400):
    """Return `count` draws of the noise of a kernel `[3, 2]` and a bias, as steps draw them."""
    weights = [keras.ops.convert_to_tensor(w) for w in (KERNEL, BIAS)]
    rule.build([])
    seed = keras.ops.copy(rule.memory[0])
    found = []
    for _ in range(count):
        z, seed = rule._normals.draw(weights, seed, 0)
        found.append([numpy(n) for n in z])
    return [np.stack(z) for z in zip(*found, strict=True)]


def test_draws_are_standard_normal_and_independent():
    kernel, bias = noise_of(WeightNoise(seed=1))
    columns = np.concatenate([kernel.reshape(400, 6), bias], axis=1)
    # Also between a step and the next.
    columns = np.concatenate([columns[:-1], columns[1:]], axis=1)
    # Means and products of 399 draws have standard deviations of 0.05, squares of 0.07; of some
    # 150 numbers none is further off than 4.5 of them but once in a thousand seeds.
    np.testing.assert_allclose(columns.mean(axis=0), 0, atol=0.23)
    np.testing.assert_allclose(columns.T @ columns / 399, np.eye(16), atol=0.32)


def test_seeds_side_by_side_share_no_draws():
    a, b = (np.concatenate([z.ravel() for z in noise_of(WeightNoise(seed=s), 20)]) for s in (0, 1))
    assert not set(a) & set(b)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_seed_determines_the_run(seed):
    def run(global_seed):
        keras.utils.set_random_seed(global_seed)
        rule = WeightNoise(0.1, seed=seed)
        model = linear(rule)
        model.train_on_batch(X, Y)
        return model.get_weights()[0]

    np.testing.assert_array_equal(run(1), run(1))
    assert np.array_equal(run(1), run(2)) == (seed is not None)


def test_live_std_acts_in_the_next_step():
    model = linear(WeightNoise(0.5, seed=1))
    model.regularizer.std = 0.0
    model.train_on_batch(X, Y)
    expected = [w - 0.1 * g for w, g in zip((KERNEL, BIAS), gradients(KERNEL, BIAS))]
    np.testing.assert_allclose(model.get_weights()[0], expected[0], atol=1e-6)
    model.regularizer.std = 0.5
    before = model.get_weights()
    model.train_on_batch(X, Y)
    noiseless = before[0] - 0.1 * gradients(*before)[0]
    assert np.max(np.abs(model.get_weights()[0] - noiseless)) > 1e-3


def test_the_log_is_the_ratio_of_noise_to_weights(float64):
    z = noise_of(WeightNoise(seed=7), 1)
    noise = 0.2 * filter_norms(KERNEL, True) * z[0][0], 0.2 * np.linalg.norm(BIAS) * z[1][0]
    norms = [np.sqrt(sum(np.sum(a**2) for a in arrays)) for arrays in (noise, (KERNEL, BIAS))]
    logs = linear(WeightNoise(0.2, seed=7)).fit(X, Y, batch_size=6, verbose=0).history
    np.testing.assert_allclose(logs["weight_noise"], norms[0] / norms[1], rtol=1e-5)


def test_weights_of_zero_have_no_noise():
    model = linear(WeightNoise(10.0))
    model.set_weights([np.zeros((3, 2)), np.zeros(2)])
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(model.get_weights()[0], 0.1 * X.T @ Y / 6, atol=1e-6)


@only_on("tensorflow", reason="`MirroredStrategy` is TensorFlow's")
@pytest.mark.skipif(not hasattr(Objective, "replica_index"), reason="The objective numbers none.")
def test_replicas_draw_apart_and_their_steps_are_averaged(mirrored, float64):
    """Two shares of equal examples: without noise of their own the replicas would agree."""
    rule, mean, shares = WeightNoise(0.2, seed=7), 0.0, []
    rule.build([])
    weights = [keras.ops.convert_to_tensor(w) for w in (KERNEL, BIAS)]
    for replica in (0, 1):
        z, _ = rule._normals.draw(weights, keras.ops.copy(rule.memory[0]), replica)
        there = (
            KERNEL + 0.2 * filter_norms(KERNEL, True) * numpy(z[0]),
            BIAS + 0.2 * np.linalg.norm(BIAS) * numpy(z[1]),
        )
        shares.append(gradients(*there)[0])
        mean = mean + shares[-1] / 2
    assert np.max(np.abs(shares[0] - shares[1])) > 1e-3
    with mirrored.scope():
        model = linear(WeightNoise(0.2, seed=7), run_eagerly=False)
    model.fit(np.tile(X, (2, 1)), np.tile(Y, (2, 1)), batch_size=12, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], KERNEL - 0.1 * mean, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"std": -0.1}, r"`std` must be a finite number, 0 or greater\. Received: std=-0\.1"),
        ({"per_filter": 1}, r"`per_filter` must be `True` or `False`\. Received: per_filter=1"),
        ({"growth": 2.0}, r"`growth` must be a .*LearningRateSchedule.* Received: growth=2\.0"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 2147483647\. Received: seed=-1"),
        ({"seed": 0.5}, r"`seed` must be an integer.* Received: seed=0\.5"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        WeightNoise(**argument)


def test_configuration_keeps_the_growth():
    growth = schedules.CosineDecay(1.0, decay_steps=10, alpha=10.0)
    rule = WeightNoise(0.02, False, growth, seed=4)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rule))
    assert again.get_config() == rule.get_config()
    # (1 - alpha) (1 + cos(pi t)) / 2 + alpha at t = 0, 1/2, 1
    np.testing.assert_allclose([again.growth(n) for n in (0, 5, 10)], [1, 5.5, 10], rtol=1e-5)


def test_layers_that_assign_their_weights_are_refused():
    inputs = keras.Input((3,))
    model = RegularizedModel(inputs, layers.SpectralNormalization(layers.Dense(2))(inputs))
    model.compile("sgd", "mse", regularizer=WeightNoise(), **EAGER)
    with pytest.raises(ValueError, match="Layers that assign their own trainable weights"):
        model.train_on_batch(X, Y)
