"""Entropy-SGD against the paper's loop in NumPy, closed forms, and Keras's own SGD."""

import keras
import numpy as np
import pytest
from algorithm_1 import flat
from frameworks import BACKEND, numpy, only_on, slices
from keras import layers
from parameters import slow_but

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import EntropySGD

EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
draw = np.random.default_rng(11)
X, Y = draw.normal(size=(22, 3)), draw.normal(size=(22, 2))
KERNEL, BIAS = draw.normal(size=(3, 2)), draw.normal(size=2)


def linear(rule, rate=1.0, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = RegularizedModel(inputs, layers.Dense(2)(inputs))
    model.set_weights([KERNEL, BIAS])
    model.compile(keras.optimizers.SGD(rate), "mse", regularizer=rule, **EAGER | kwargs)
    return model


def outer_step(rule, weights, mini_batches, gamma, seed):
    """Return w - mu and the next seed, as Algorithm 1 of the paper reads in weights.

    `mini_batches` are lists of rows of X; the loss is the mean over examples and outputs of
    (x W + b - y)^2.
    """
    inner, mean, velocities = list(weights), list(weights), [0.0, 0.0]
    for rows in mini_batches:
        kernel, bias = inner
        error = (X[rows] @ kernel + bias - Y[rows]) / len(rows)
        normals = [0.0, 0.0]
        if rule.noise:
            arrays = [keras.ops.convert_to_tensor(w) for w in weights]
            draws, seed = rule._normals.draw(arrays, seed)
            normals = [numpy(z) for z in draws]
        for k, g in enumerate((X[rows].T @ error, error.sum(axis=0))):
            velocities[k] = rule.momentum * velocities[k] + g
            slope = g + rule.momentum * velocities[k] - gamma * (weights[k] - inner[k])
            noise = np.sqrt(rule.step_size) * rule.noise * normals[k]
            inner[k] = inner[k] - rule.step_size * slope + noise
            mean[k] = rule.averaging * mean[k] + (1 - rule.averaging) * inner[k]
    return [w - m for w, m in zip(weights, mean)], seed


@pytest.mark.parametrize("scaled", slow_but([True, False], True))
def test_steps_are_those_of_the_paper(scaled, float64):
    """Noise, growth and a live gamma; the centre is what `evaluate` sees.

    Keras keeps the learning rate in float32, in which 0.5 is exact, and metrics, too.
    """
    rule = EntropySGD(4, 0.05, 0.5, 0.3, noise=0.2, scale_by_gamma=scaled, seed=3)
    model = linear(rule, rate=0.5)
    weights, seed = [KERNEL, BIAS], keras.ops.copy(rule._normals.memory()[0])
    for t, gamma in enumerate((0.5, 0.5, 2.0)):
        rule.gamma = gamma
        gamma *= 1.3**t
        way, seed = outer_step(rule, weights, slices(22, 4), gamma, seed)
        weights = [w - 0.5 * (gamma if scaled else 1.0) * d for w, d in zip(weights, way)]
        logs = model.fit(X, Y, batch_size=22, shuffle=False, verbose=0).history
        np.testing.assert_allclose(logs["entropy_sgd"], np.linalg.norm(flat(way)), rtol=1e-6)
    for ours, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    loss = np.mean((X @ weights[0] + weights[1] - Y) ** 2)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(loss, rel=1e-6)


def network(base):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, "tanh", kernel_regularizer="l2")(inputs)
    hidden = layers.Dropout(0.3, seed=1)(layers.BatchNormalization()(hidden))
    return base(inputs, layers.Dense(2)(hidden))


@pytest.mark.parametrize(
    "mode", [{}, pytest.param(EAGER, marks=pytest.mark.slow)], ids=["compiled", "eager"]
)
def test_without_force_and_noise_a_step_is_steps_of_keras(mode):
    """With mu = x'_L and a rate of 1, for weights, batch-norm statistics, seeds, loss and metrics.

    The second batch holds fewer examples than there are steps. Float32 rounds weights of order one
    by 1e-7 in each of the nine steps, which momentum multiplies.
    """
    rule = EntropySGD(5, gamma=0.0, noise=0.0, averaging=0.0)
    ours = network(RegularizedModel)
    ours.compile(keras.optimizers.SGD(1.0), "mse", metrics=["mae"], regularizer=rule, **mode)
    logs = ours.fit(X, Y, batch_size=18, shuffle=False, verbose=0).history
    plain, loss, mae = network(keras.Model), 0.0, 0.0
    for first, size in ((0, 18), (18, 4)):
        optimizer = keras.optimizers.SGD(0.1, 0.9, nesterov=True)
        plain.compile(optimizer, "mse", metrics=["mse", "mae"], **EAGER)
        # The default coefficient of L2 is 0.01; what is reported of the penalty is that at w.
        loss += size * 0.01 * np.sum(plain.get_weights()[0] ** 2)
        for rows in slices(size, 5):
            rows = first + rows
            found = plain.train_on_batch(X[rows], Y[rows], return_dict=True)
            plain.reset_metrics()
            loss += len(rows) * float(found["mse"])
            mae += len(rows) * float(found["mae"])
    for a, b in zip(ours.variables, plain.variables, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logs["loss"], loss / len(X), rtol=1e-5)
    np.testing.assert_allclose(logs["mae"], mae / len(X), rtol=1e-5)


def test_one_step_without_force_is_sgd_at_another_rate():
    """At rate (1 - averaging) step_size: Keras on torch and TensorFlow rounds some 1e-7."""
    rule = EntropySGD(1, 0.1, gamma=0.0, noise=0.0, momentum=0.0, averaging=0.75)
    plain = network(keras.Model)
    for model, rate, kwargs in (
        (network(RegularizedModel), 0.5, {"regularizer": rule}),
        (plain, 0.5 * 0.25 * 0.1, {}),
    ):
        model.compile(keras.optimizers.SGD(rate), "mse", metrics=["mae"], **kwargs, **EAGER)
        logs = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history
        if model is not plain:
            ours, our_logs = model, logs
    for a, b in zip(ours.variables, plain.variables, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=1e-6)
    for key in logs:
        assert our_logs[key] == pytest.approx(logs[key], rel=1e-6)


CURVATURES = np.array([4.0, 2.0, 1.0, 0.5])


def way_on_a_quadratic(start, **kwargs):
    """Return what the optimizer gets on sum_k curvatures[k] w[k]^2 / 2 in every mini-batch."""
    rule = EntropySGD(gamma_growth=0.0, noise=0.0, momentum=0.0, **kwargs)
    model = RegularizedModel.from_model(
        keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    )
    model.compile(keras.optimizers.SGD(1.0), "mse", regularizer=rule, **EAGER)
    model.set_weights([start.reshape(4, 1)])
    x = np.tile(np.diag(np.sqrt(2 * CURVATURES)), (rule.num_steps, 1))
    model.train_on_batch(x, np.zeros((len(x), 1)))
    return start - flat(model.weights)


def test_a_finite_chain_on_a_quadratic(float64):
    """u_k = (1 - M^k) u with M = 1 - step_size (a + gamma), and mu averages them."""
    start, gamma = np.array([1.0, -2.0, 0.5, 3.0]), 0.7
    expected = np.zeros(4)
    for k in range(1, 21):
        reached = 1 - (1 - 0.1 * (CURVATURES + gamma)) ** k
        expected += 0.25 * 0.75 ** (20 - k) * reached * CURVATURES / (CURVATURES + gamma) * start
    np.testing.assert_allclose(way_on_a_quadratic(start, gamma=gamma), expected, rtol=1e-12)


def test_a_long_chain_gives_the_gradient_of_the_local_entropy(float64):
    """Of a quadratic it is a gamma / (a + gamma) w; of 70 steps the slowest shrink by 0.64."""
    start, gamma = np.array([1.0, -2.0, 0.5, 3.0]), 0.7
    way = way_on_a_quadratic(
        start, num_steps=70, step_size=0.3, gamma=gamma, averaging=0.5, scale_by_gamma=True
    )
    expected = CURVATURES * gamma / (CURVATURES + gamma) * start
    np.testing.assert_allclose(way, expected, rtol=1e-12)


def test_a_resumed_run_goes_on_with_the_noise(tmp_path):
    def run(model, epochs):
        model.fit(X, Y, batch_size=22, epochs=epochs, shuffle=False, verbose=0)
        return model

    rule = {"num_steps": 4, "noise": 0.5, "gamma_growth": 0.5}
    whole = run(linear(EntropySGD(**rule, seed=3)), 3)
    run(linear(EntropySGD(**rule, seed=3)), 2).save(tmp_path / "model.keras")
    resumed = run(keras.models.load_model(tmp_path / "model.keras"), 1)
    np.testing.assert_array_equal(flat(resumed.weights), flat(whole.weights))
    other = run(linear(EntropySGD(**rule, seed=4)), 3)
    assert np.max(np.abs(flat(other.weights) - flat(whole.weights))) > 1e-3


@only_on("tensorflow", reason="`MirroredStrategy` is TensorFlow's")
@pytest.mark.parametrize(
    ("noise", "batch_size"),
    [
        pytest.param(0.2, 18, marks=pytest.mark.slow),
        pytest.param(0.2, 8, marks=pytest.mark.slow),
        pytest.param(0.0, 18, marks=pytest.mark.slow),
    ],
)
def test_replicas_share_one_chain(noise, batch_size, mirrored, float64):
    """Mini-batch l is the union of slices l; batches of 8, 8 and 6 examples, or of 18 and 4.

    In the last one, shares of two examples make two steps of the three.
    """
    rule = EntropySGD(3, 0.05, 0.5, noise=noise, seed=3)
    weights, seed = [KERNEL, BIAS], keras.ops.copy(rule._normals.memory()[0])
    for t, first in enumerate(range(0, len(X), batch_size)):
        half = min(batch_size, len(X) - first) // 2
        shares = [[first + k * half + rows for rows in slices(half, 3)] for k in (0, 1)]
        unions = [np.concatenate(pair) for pair in zip(*shares)]
        way, seed = outer_step(rule, weights, unions, 0.5 * 1.001**t, seed)
        weights = [w - d for w, d in zip(weights, way)]
    with mirrored.scope():
        model = linear(rule, run_eagerly=False)
    model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0)
    for ours, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@only_on("tensorflow", reason="`MirroredStrategy` is TensorFlow's")
def test_replicas_of_different_shares_weigh_by_examples(mirrored, float64):
    """Five examples are three and two; and one is one and none."""
    rule = EntropySGD(3, 0.05, 0.5, 0.0, noise=0.2, seed=3)
    weights, seed = [KERNEL, BIAS], keras.ops.copy(rule._normals.memory()[0])
    for mini_batches in ([[0, 3], [1, 4], [2]], [[5]]):
        way, seed = outer_step(rule, weights, mini_batches, 0.5, seed)
        weights = [w - d for w, d in zip(weights, way)]
    with mirrored.scope():
        model = linear(rule, run_eagerly=False)
    model.fit(X[:6], Y[:6], batch_size=5, shuffle=False, verbose=0)
    for ours, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_overflow_skips_the_step_and_leaves_batch_norm_finite():
    keras.config.set_dtype_policy("mixed_float16")
    model = network(RegularizedModel)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), 2.0**40)
    model.compile(optimizer, "mse", regularizer=EntropySGD(4), **EAGER)
    before = flat(model.trainable_variables)
    logs = model.fit(X, Y, batch_size=22, verbose=0).history
    np.testing.assert_array_equal(flat(model.trainable_variables), before)
    assert float(optimizer.dynamic_scale) == 2.0**39
    assert all(np.all(np.isfinite(numpy(v))) for v in model.non_trainable_variables)
    assert np.isfinite(logs["loss"][0]) and np.isfinite(logs["entropy_sgd"][0])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_steps": 0}, r"`num_steps` must be an integer of at least 1\. Received: num_steps=0"),
        ({"step_size": 0.0}, r"`step_size` must be a finite number greater than 0\. Received: st"),
        ({"gamma": -1.0}, r"`gamma` must be a finite number, 0 or greater\. Received: gamma=-1\.0"),
        ({"gamma_growth": -1.0}, r"`gamma_growth` must be a finite number, 0 or greater"),
        ({"noise": -1.0}, r"`noise` must be a finite number, 0 or greater\. Received: noise=-1"),
        ({"momentum": 1.0}, r"`momentum` must be a number in \[0, 1\)\. Received: momentum=1\.0"),
        ({"averaging": -0.1}, r"`averaging` must be a number in \[0, 1\)\. Received: averaging=-"),
        ({"scale_by_gamma": 1}, r"`scale_by_gamma` must be `True` or `False`\. Received: scale"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 2147483647\. Received: seed=-1"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        EntropySGD(**argument)


def test_layers_that_assign_their_weights_are_refused():
    inputs = keras.Input((3,))
    model = RegularizedModel(inputs, layers.SpectralNormalization(layers.Dense(2))(inputs))
    model.compile("sgd", "mse", regularizer=EntropySGD(2), **EAGER)
    with pytest.raises(ValueError, match="Layers that assign their own trainable weights"):
        model.train_on_batch(X, Y)
