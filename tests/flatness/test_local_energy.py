"""The local energy against closed forms: quadratic losses, errors of linear classifiers.

Estimates are compared within 4 standard errors, with fixed seeds.
"""

import math
import re
import statistics

import keras
import numpy as np
import pytest
from frameworks import numpy
from measuring import Quadratic, assert_untouched, kinds_of_data
from nets import NUM_CLASSES, classifier, compiled, from_logits, sequential

from keras_infomcr.flatness import local_energy
from keras_infomcr.flatness.data.examples import Batches
from keras_infomcr.flatness.loss.batch_norm_statistics import reestimated_state
from keras_infomcr.flatness.loss.zero_one_error import LossAndError

layers = keras.layers


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def numbers(result):
    return np.array([result.value, result.error])


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_rise_of_a_quadratic_loss_is_half_the_trace_of_the_hessian(rng, kind):
    """E[s^T z + z^T B z / 2] = tr B / 2, and its variance is ||s||^2 + ||B||_F^2 / 2."""
    quadratic = Quadratic(rng)
    sigma = np.array([0.1, 1.0])
    result = local_energy(
        quadratic.model, quadratic.x, quadratic.y, sigma=sigma, kind=kind, num_samples=200, seed=0
    )
    scale = quadratic.weights if kind == "multiplicative" else np.ones(8)
    slope, hessian = scale * quadratic.slope, scale * quadratic.hessian * scale[:, None]
    expected = sigma**2 * np.trace(hessian) / 2
    np.testing.assert_array_less(np.abs(result.value - expected), 4 * result.stderr)
    variance = sigma**2 * np.sum(slope**2) + sigma**4 * np.sum(hessian**2) / 2
    # The variance of 200 numbers is known to some sqrt(2 / 200), 10 %, more for heavy tails.
    np.testing.assert_allclose(result.stderr, np.sqrt(variance / 200), rtol=0.3)
    assert np.isnan(result.error).all() and np.isnan(result.error_stderr).all()
    np.testing.assert_array_equal(result.sigma, sigma)


def test_weight_penalties_are_no_part_of_the_loss(data):
    penalised = sequential(layers.Dense(NUM_CLASSES, kernel_regularizer=keras.regularizers.L2(9.0)))
    plain = sequential(layers.Dense(NUM_CLASSES))
    plain.set_weights(penalised.get_weights())
    results = [local_energy(m, *data, num_samples=3, seed=0).value for m in (plain, penalised)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)  # of losses of 1 rounded to 1e-7


# ---------------------------------------------------------------- the 0-1 error


def binary_from_logits():
    return keras.losses.BinaryCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    ("units", "activation", "loss", "labels_of", "kind"),
    [
        (1, None, binary_from_logits, lambda y: y, "multiplicative"),
        pytest.param(
            1, None, binary_from_logits, lambda y: y, "additive", marks=pytest.mark.slow
        ),
        pytest.param(1, "sigmoid", lambda: "binary_crossentropy", lambda y: y[:, None],
                     "multiplicative", marks=pytest.mark.slow),
        (2, None, from_logits, lambda y: y, "multiplicative"),
        pytest.param(2, "softmax", lambda: "sparse_categorical_crossentropy",
                     lambda y: y[:, None], "multiplicative", marks=pytest.mark.slow),
        (2, "softmax", lambda: "categorical_crossentropy", lambda y: np.eye(2)[y], "additive"),
    ],
)  # fmt: skip
def test_error_of_a_linear_classifier_is_a_normal_probability(
    rng, units, activation, loss, labels_of, kind
):
    """The margin m = a^T w of an example is normal: P(m < 0) = Phi(-a^T w / (sigma |a w|)).

    With the largest sigma it is 1/2, chance, whatever the example. Two of 12 are wrong before.
    """
    model = sequential(layers.Dense(units, activation, use_bias=False), loss=loss())
    kernel = model.get_weights()[0]
    decision = kernel[:, -1] - (kernel[:, 0] if units == 2 else 0)
    x, y = rng.normal(size=(12, 6)).astype("float32"), np.arange(12) % 2
    signs = (2 * y - 1)[:, None]
    x *= signs * np.sign(x @ decision)[:, None]
    x[:2] *= -1
    a = signs * x if units == 1 else np.concatenate([-signs * x, signs * x], axis=1)
    w, sigma = kernel.T.ravel(), np.array([0.5, 1e6])
    settings = {"sigma": sigma, "num_samples": 100, "kind": kind, "seed": 0}
    result = local_energy(model, x, labels_of(y), **settings)
    spread = np.linalg.norm(a * w if kind == "multiplicative" else a, axis=1)
    normal = np.vectorize(statistics.NormalDist().cdf)
    expected = normal(-(a @ w) / (sigma[:, None] * spread)).mean(axis=1) - 2 / 12
    assert expected[1] == pytest.approx(1 / 2 - 2 / 12, abs=1e-5)
    np.testing.assert_array_less(np.abs(result.error - expected), 4 * result.error_stderr)
    # Errors are between 0 and 1, so that their standard deviation is 1/2 at most.
    assert np.all(result.error_stderr <= 0.5 / math.sqrt(99))


def test_error_does_not_rise_where_the_decision_cannot_change(data):
    """Logits of a softplus are positive: the class is 1, which is wrong for a half, always."""
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = sequential(layers.Dense(1), layers.Activation("softplus"), loss=loss)
    result = local_energy(model, data[0], np.arange(12) % 2, sigma=1.0, kind="additive", seed=0)
    assert result.error == result.error_stderr == 0
    assert abs(result.value) > 1e-3


def test_error_of_soft_binary_labels_is_that_of_the_nearer_class(data):
    model = sequential(layers.Dense(1), loss=binary_from_logits())
    soft = np.where(data[0] @ model.get_weights()[0] > 0, 0.9, 0.1).astype("float32")
    soft[:3] = 1 - soft[:3]
    loss, error = LossAndError(model).loss_and_error([(data[0], soft)], *energy_at(model))
    assert error == pytest.approx(3 / 12)
    assert loss == pytest.approx(model.evaluate(data[0], soft, verbose=0), rel=1e-5)


def energy_at(model):
    energy = LossAndError(model)
    return energy.weights(), energy.state()


def test_error_leaves_out_what_is_masked(rng):
    """Padding, 0, is no word; a third of the words is labelled wrong."""
    words = np.repeat([[1, 2, 3, 0, 0, 0]], 4, axis=0)
    stack = [layers.Embedding(4, 5, mask_zero=True), layers.Dense(NUM_CLASSES)]
    model = compiled(keras.Sequential([keras.Input((6,), dtype="int32"), *stack]), from_logits())
    labels = numpy(model(words)).argmax(axis=-1)
    labels[:, 0] = (labels[:, 0] + 1) % NUM_CLASSES
    labels[:, 3:] = (labels[:, 3:] + 1) % NUM_CLASSES
    _, error = LossAndError(model).loss_and_error([(words, labels)], *energy_at(model))
    assert error == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanAbsoluteError()])
def test_other_losses_have_no_error(data, loss):
    result = local_energy(sequential(layers.Dense(1), loss=loss), *data, num_samples=2)
    assert math.isnan(result.error) and math.isnan(result.error_stderr)
    assert math.isfinite(result.value)


# ---------------------------------------------------------------- draws


def test_no_noise_raises_nothing(data):
    result = local_energy(classifier(), *data, sigma=0.0, num_samples=2)
    assert numbers(result).tolist() == [result.stderr, result.error_stderr] == [0.0, 0.0]
    model = sequential(layers.Dense(NUM_CLASSES, kernel_initializer="zeros"))
    result = local_energy(model, *data, sigma=[1.0], num_samples=2)  # multiplies weights of zero
    assert result.value.tolist() == result.error.tolist() == [0.0]


def test_grid_is_separate_calls_of_one_seed(float64, data):
    model, settings = classifier(), {"num_samples": 3, "seed": 5}
    grid = local_energy(model, *data, sigma=(0.3, 0.0, 1.0), **settings)
    separate = [local_energy(model, *data, sigma=s, **settings) for s in (0.3, 0.0, 1.0)]
    for k, alone in enumerate(separate):
        for name in ("value", "stderr", "error", "error_stderr", "sigma"):
            assert isinstance(getattr(alone, name), float)
            assert getattr(grid, name)[k] == pytest.approx(getattr(alone, name), rel=1e-12)
    assert grid.value[0] != grid.value[2]
    assert local_energy(model, *data, num_samples=3, seed=6).value != alone.value
    assert math.isnan(local_energy(model, *data, num_samples=1).stderr)


@pytest.mark.parametrize("settings", [{"chunk_size": 5}, {"num_examples": 12}])
def test_batches_and_order_do_not_change_the_result(float64, data, settings):
    model = sequential(layers.Dense(5), layers.BatchNormalization(), layers.Dense(NUM_CLASSES))
    expected = local_energy(model, *data, num_samples=2, seed=0)
    result = local_energy(model, *data, num_samples=2, seed=0, **settings)
    np.testing.assert_allclose(numbers(result), numbers(expected), rtol=1e-9, atol=1e-15)


@kinds_of_data
def test_batches_give_what_arrays_give(data, make):
    model = sequential(layers.Dense(NUM_CLASSES))
    settings = {"sigma": 1.0, "num_samples": 2, "seed": 0}
    expected = local_energy(model, *data, **settings)
    result = local_energy(model, make(*data), **settings)
    np.testing.assert_allclose(numbers(result), numbers(expected), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- batch normalisation


def with_batch_norm(**settings):
    stack = [layers.Dense(5, use_bias=False), layers.BatchNormalization(**settings)]
    return sequential(*stack, layers.Dense(NUM_CLASSES))


def test_statistics_given_anew_make_the_scale_of_a_kernel_vanish(float64, data):
    """BN(c w (1 + sigma z) x) does not depend on c once the moments are those of its input."""
    values = []
    for scale in (1, 10):
        keras.utils.set_random_seed(0)
        model = with_batch_norm(epsilon=1e-12)
        model.layers[0].kernel.assign(scale * model.layers[0].kernel.value)
        for given_anew in (True, False):
            settings = {"num_samples": 2, "seed": 0, "reestimate": given_anew}
            values.append(local_energy(model, *data, sigma=0.5, **settings).value)
    # The epsilon of 1e-12 beside variances of some 0.1 or more.
    assert values[0] == pytest.approx(values[2], rel=1e-9)
    assert abs(values[1] - values[3]) > 0.1


@pytest.mark.parametrize("chunk_size", [128, 5])
def test_statistics_given_anew_are_those_of_the_batches(float64, data, chunk_size):
    """Of all of them together. Dropout does not act."""
    stack = [layers.Dropout(0.5), layers.BatchNormalization(center=False, scale=False)]
    model = sequential(*stack, layers.Dense(NUM_CLASSES))
    x, y = data
    settings = {"num_samples": 2, "seed": 0, "chunk_size": chunk_size}
    moving = local_energy(model, x, y, **settings).value
    result = local_energy(model, x, y, reestimate=True, **settings).value
    model.layers[1].set_weights([x.astype("float64").mean(axis=0), x.astype("float64").var(axis=0)])
    assert result == pytest.approx(local_energy(model, x, y, **settings).value, rel=1e-9)
    assert abs(moving - result) > 1e-6


def test_statistics_of_a_layer_called_twice_are_the_means_of_its_calls(float64, data):
    inputs, norm = keras.Input((6,)), layers.BatchNormalization()
    both = layers.concatenate([norm(inputs), norm(10 * inputs)])
    energy = LossAndError(
        compiled(keras.Model(inputs, layers.Dense(NUM_CLASSES)(both)), from_logits())
    )
    mean, variance = reestimated_state(
        energy, Batches(*data, 128), energy.weights(), energy.state()
    )[:2]
    x = data[0].astype("float64")
    np.testing.assert_allclose(mean, 5.5 * x.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(variance, 50.5 * x.var(axis=0), rtol=1e-9)
    assert norm.momentum == 0.99


def test_statistics_are_those_of_the_weights_given(float64, data):
    model = with_batch_norm()
    energy = LossAndError(model)
    weights = np.random.default_rng(1).normal(size=energy.size)
    before = energy.state()
    state = reestimated_state(energy, Batches(*data, 128), weights, before)
    hidden = data[0] @ weights[:30].reshape(6, 5)
    expected = [hidden.mean(axis=0), hidden.var(axis=0)]
    np.testing.assert_allclose(state[:2], expected, rtol=1e-9)
    np.testing.assert_array_equal([keras.ops.convert_to_numpy(a) for a in before[:2]],
                                  model.layers[1].get_weights()[2:])  # fmt: skip


def test_frozen_batch_normalisation_keeps_its_statistics(float64, data):
    model, results = with_batch_norm(), []
    model.layers[1].trainable = False
    compiled(model, from_logits())
    for given_anew in (True, False):
        settings = {"num_samples": 2, "seed": 0, "reestimate": given_anew}
        results.append(local_energy(model, *data, sigma=0.5, **settings).value)
    assert results[0] == results[1]


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("given_anew", [True, False])
def test_model_and_seeds_are_untouched(given_anew):
    settings = {"num_samples": 2, "reestimate": given_anew}
    assert_untouched(lambda *args: local_energy(*args, **settings))


def test_progress_counts_the_passes_over_the_data(data, capsys):
    local_energy(
        sequential(layers.Dense(NUM_CLASSES)), *data, sigma=[0, 1], num_samples=3, verbose=1
    )
    assert "7/7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -0.1}, "`sigma` must be a finite number, 0 or greater. Received: sigma=-0.1"),
        ({"sigma": [0.1, math.nan]}, "`sigma` must be a finite number, 0 or greater."),
        ({"sigma": []}, "`sigma` must be a number or a sequence. Received: sigma=[]"),
        ({"sigma": [[0.1]]}, "`sigma` must be a number or a sequence. Received: sigma=[[0.1]]"),
        ({"num_samples": 0}, "`num_samples` must be an integer of at least 1."),
        ({"kind": "both"}, "`kind` must be one of 'multiplicative', 'additive'. Received: kind="),
        ({"reestimate": 1}, "`reestimate` must be `True` or `False`."),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the data"),
        ({"y": None}, "Labels are needed. Received: y=None."),
        ({"x": iter([]), "y": None}, "Received: an iterator or endless data"),
        ({"x": [], "y": None}, "The data must not be empty. Received: no batch"),
    ],
)  # fmt: skip
def test_bad_arguments(data, arguments, message):
    arguments = {"x": data[0], "y": data[1], **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        local_energy(classifier(), **arguments)


def test_loss_must_be_a_mean(data):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    with pytest.raises(ValueError, match="The loss must be a mean over the examples"):
        local_energy(sequential(layers.Dense(NUM_CLASSES), loss=loss), *data)
