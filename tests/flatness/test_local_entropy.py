"""The local entropy against the Gaussian integrals of a quadratic loss.

What holds for the local learning coefficient too is asked of all three measures.

Estimates are compared within 4 standard errors, with fixed seeds.
"""

import math
import re

import keras
import mpmath
import numpy as np
import pytest
from measuring import Quadratic, assert_untouched, kinds_of_data, softmax
from nets import NUM_CLASSES, classifier, sequential

from keras_infomcr.flatness import (
    local_entropy,
    local_entropy_gradient_norm,
    local_learning_coefficient,
)

layers = keras.layers
MEASURES = [local_entropy, local_entropy_gradient_norm, local_learning_coefficient]
FEW = {local_entropy: {"num_samples": 2},
       local_entropy_gradient_norm: {"num_steps": 4, "num_chains": 2},
       local_learning_coefficient: {"num_steps": 4, "num_chains": 2}}  # fmt: skip


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def measured(measure, quadratic, **settings):
    return measure(quadratic.model, quadratic.x, quadratic.y, seed=0, **settings)


# ---------------------------------------------------------------- the value


@pytest.mark.parametrize(
    ("settings", "gamma"),
    [({"fitted": True}, 1.0), ({"offset": 3.0}, 10.0)],
    ids=["curved", "steep"],
)
def test_entropy_of_a_quadratic_loss_is_a_gaussian_integral(rng, settings, gamma):
    """ln E exp(-g xi - xi A xi / 2) = (g (A + gamma)^-1 g - ln|1 + A / gamma|) / 2."""
    quadratic = Quadratic(rng, **settings)
    curved = quadratic.hessian + gamma * np.eye(8)
    expected = quadratic.slope @ np.linalg.solve(curved, quadratic.slope) / 2
    expected -= np.linalg.slogdet(curved / gamma)[1] / 2 + quadratic.loss
    result = measured(local_entropy, quadratic, gamma=gamma, num_samples=400)
    assert abs(result.value - expected) < 4 * result.stderr
    assert abs(expected + quadratic.loss) > 5 * result.stderr


def test_samples_are_the_losses_at_the_disturbed_weights(rng):
    """Their mean is L + tr A / (2 gamma)."""
    quadratic = Quadratic(rng)
    samples = measured(local_entropy, quadratic, gamma=5.0, num_samples=200).samples
    expected = quadratic.loss + np.trace(quadratic.hessian) / 10
    assert abs(samples.mean() - expected) < 4 * np.std(samples, ddof=1) / math.sqrt(200)


def test_losses_whose_exponentials_vanish(rng):
    """exp(-L) of a loss of 1e4 is 0 in floating point, but not its logarithm."""
    quadratic = Quadratic(rng, offset=100.0)
    result = measured(local_entropy, quadratic, gamma=10.0, num_samples=20)
    assert math.exp(-result.samples.min()) == 0
    terms = [mpmath.exp(-mpmath.mpf(float(s))) for s in result.samples]
    mean = mpmath.fsum(terms) / 20
    assert result.value == pytest.approx(float(mpmath.log(mean)), rel=1e-13)
    variance = mpmath.fsum((t - mean) ** 2 for t in terms) / 19
    # Of terms up to e^0: their exponents of some 1e4 are known to 1e-12.
    assert result.stderr == pytest.approx(float(mpmath.sqrt(variance / 20) / mean), rel=1e-10)


def test_one_sample_has_no_standard_error(data):
    result = local_entropy(classifier(), *data, num_samples=1)
    assert math.isnan(result.stderr) and result.value == -result.samples[0]


# ---------------------------------------------------------------- its gradient


@pytest.mark.parametrize(("gamma", "step_size"), [(4.0, 0.5), (40.0, 1.0)])
def test_gradient_of_a_quadratic_loss_has_a_closed_form(rng, gamma, step_size):
    """gamma (w - <w'>) = gamma A (A + gamma)^-1 (w - c), with A (w - c) the slope at w."""
    quadratic = Quadratic(rng, offset=10.0)
    curved = quadratic.hessian + gamma * np.eye(8)
    expected = gamma * np.linalg.norm(np.linalg.solve(curved, quadratic.slope))
    settings = {"gamma": gamma, "step_size": step_size, "num_steps": 30, "num_chains": 16}
    result = measured(local_entropy_gradient_norm, quadratic, **settings)
    forgotten = (1 - step_size) ** 15 * expected  # of the start, 3e-5 at most
    assert abs(result.value - expected) < 4 * result.stderr + forgotten
    assert result.stderr < 0.01 * expected
    assert abs(expected - np.linalg.norm(quadratic.slope)) > 6 * result.stderr  # of the loss itself


def test_gradient_of_one_weight_against_quadrature():
    """The loss softplus(w) at w = 3 is no quadratic over the width of 1 / sqrt(gamma)."""
    loss, gamma, step_size = keras.losses.BinaryCrossentropy(from_logits=True), 0.1, 0.2
    model = sequential(layers.Dense(1, use_bias=False), inputs=(1,), loss=loss)
    model.set_weights([np.array([[3.0]])])
    grid = np.linspace(-40, 40, 20_001)
    density = np.exp(-np.logaddexp(0, grid) - gamma / 2 * (grid - 3) ** 2)
    expected = gamma * (3 - np.sum(grid * density) / np.sum(density))
    settings = {"gamma": gamma, "step_size": step_size, "num_steps": 60, "num_chains": 16}
    data = np.ones((1, 1), "float32"), np.zeros(1)
    result = local_entropy_gradient_norm(model, *data, seed=0, **settings)
    # The start is forgotten to 0.8^30, 0.1 %. Steps of 0.2 instead of infinitely small ones add
    # 0.6 %, by 200,000 chains of NumPy.
    assert abs(result.value - expected) < 4 * result.stderr + 0.01 * expected
    assert abs(expected - 1 / (1 + math.exp(-3))) > 0.5  # the gradient of the loss itself


def test_gradient_is_that_of_the_loss_where_gamma_is_large(float64, data):
    """With the part that the default steps forget: sum_{k = 11..20} (1 - 0.5^k) / 10."""
    model = sequential(layers.Dense(NUM_CLASSES, bias_initializer="normal"))
    kernel, bias = model.get_weights()
    slopes = (softmax(data[0] @ kernel + bias) - np.eye(NUM_CLASSES)[data[1]]) / 12
    gradient = np.concatenate([(data[0].T @ slopes).ravel(), slopes.sum(axis=0)])
    expected = np.linalg.norm(gradient) * np.mean(1 - 0.5 ** np.arange(11, 21))
    result = local_entropy_gradient_norm(model, *data, gamma=1e12, seed=0)
    # Weights that are 1e-6 away, by a standard deviation, have gradients that far away.
    assert result.value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(result.samples, [expected] * 4, rtol=1e-5)


def test_two_chains_have_no_standard_error(data):
    result = local_entropy_gradient_norm(classifier(), *data, num_chains=2, num_steps=2)
    assert math.isnan(result.stderr)


def test_noise_is_no_gradient(rng):
    """At the minimum the chains' own norms are noise, which their products are without."""
    model = keras.Sequential([keras.Input((200,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    x = rng.normal(size=(400, 200)).astype("float32")
    y = x @ model.get_weights()[0]
    result = local_entropy_gradient_norm(model, x, y, num_chains=8, seed=0)
    assert result.value <= 4 * result.stderr
    assert result.value < result.samples.mean() / 2


# ---------------------------------------------------------------- data, draws and arguments


@pytest.mark.parametrize("measure", MEASURES)
def test_batches_and_order_do_not_change_the_result(float64, data, measure):
    model = sequential(layers.Dense(5), layers.BatchNormalization(), layers.Dense(NUM_CLASSES))
    settings = {"gamma": 1.0, "seed": 0, **FEW[measure]}
    expected = measure(model, *data, **settings)
    result = measure(model, *data, chunk_size=5, num_examples=12, **settings)
    np.testing.assert_allclose(result.samples, expected.samples, rtol=1e-9)
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    others = measure(model, *data, **{**settings, "seed": 1}).samples
    assert not np.isin(others, expected.samples).any()


@kinds_of_data
def test_batches_give_what_arrays_give(data, make):
    model = sequential(layers.Dense(NUM_CLASSES))
    for measure in MEASURES:
        settings = {"gamma": 1.0, "seed": 0, **FEW[measure]}
        results = [measure(model, *d, **settings).value for d in (data, (make(*data),))]
        assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_weight_penalties_are_no_part_of_the_loss(data):
    penalised = sequential(layers.Dense(NUM_CLASSES, kernel_regularizer=keras.regularizers.L2(9.0)))
    plain = sequential(layers.Dense(NUM_CLASSES))
    plain.set_weights(penalised.get_weights())
    for measure in MEASURES:
        values = [measure(m, *data, seed=0, **FEW[measure]).value for m in (plain, penalised)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_model_and_seeds_are_untouched(measure):
    assert_untouched(lambda *args: measure(*args, **FEW[measure]))


def test_progress_counts_the_passes_over_the_data(data, capsys):
    model = sequential(layers.Dense(NUM_CLASSES))
    local_entropy(model, *data, num_samples=3, verbose=1)
    assert "3/3" in capsys.readouterr().out
    local_entropy_gradient_norm(model, *data, num_steps=2, num_chains=4, verbose=1)
    assert "8/8" in capsys.readouterr().out
    local_learning_coefficient(model, *data, num_steps=2, num_chains=4, verbose=1)
    assert "9/9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, "`gamma` must be a finite number greater than 0. Received: gamma=0.0"),
        ({"gamma": math.inf}, "`gamma` must be a finite number greater than 0."),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the data"),
        ({"y": None}, "Labels are needed. Received: y=None."),
        ({"x": [], "y": None}, "The data must not be empty. Received: no batch"),
    ],
)
@pytest.mark.parametrize("measure", MEASURES)
def test_bad_arguments(data, measure, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(classifier(), **{"x": data[0], "y": data[1], **arguments})


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        (local_entropy, {"num_samples": 0}, "`num_samples` must be an integer of at least 1."),
        (MEASURES[1], {"num_steps": 1}, "`num_steps` must be an integer of at least 2."),
        (MEASURES[1], {"num_chains": 0}, "`num_chains` must be an integer of at least 2."),
        (MEASURES[1], {"step_size": 1.1}, "`step_size` must be a number in (0, 1]. Received: step"),
        (MEASURES[2], {"num_steps": 1}, "`num_steps` must be an integer of at least 2."),
        (MEASURES[2], {"num_chains": 0}, "`num_chains` must be an integer of at least 1."),
        (MEASURES[2], {"step_size": 0.0}, "`step_size` must be a number in (0, 1]. Received: step"),
        (MEASURES[2], {"inverse_temperature": 0}, "`inverse_temperature` must be a finite number"),
        (MEASURES[2], {"num_examples": 1}, "n / ln(n) needs 2 examples or more. Received: 1"),
    ],
)
def test_bad_arguments_of_their_own(data, measure, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(classifier(), *data, **arguments)
