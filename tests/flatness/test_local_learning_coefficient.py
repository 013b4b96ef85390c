"""The local learning coefficient against closed forms of the chain and of the integral.

Estimates are compared within 4 standard errors, with fixed seeds. What all measures by chains and
draws have in common is tested in test_local_entropy.py.
"""

import math

import keras
import numpy as np
import pytest
from measuring import Quadratic
from nets import classifier

from keras_infomcr.flatness import local_learning_coefficient

layers = keras.layers


@pytest.mark.parametrize(
    ("settings", "gamma", "b", "step_size", "num_steps"),
    [
        ({"fitted": True}, 1.0, 8.0, 0.03, 40),
        pytest.param({"fitted": True}, 1.0, 8.0, 0.1, 40, marks=pytest.mark.slow),
        pytest.param({"fitted": True}, 40.0, 8.0, 1.0, 40, marks=pytest.mark.slow),
        pytest.param({"offset": 3.0}, 1.0, 8.0, 0.05, 40, marks=pytest.mark.slow),
        ({"offset": 3.0}, 1e4, 8e4, 0.05, 4),
    ],
    ids=["short steps", "long steps", "no memory", "no minimum", "cold"],
)
def test_chain_on_a_quadratic_loss_has_a_closed_form(rng, settings, gamma, b, step_size, num_steps):
    """Along an eigenvector of the Hessian a chain is an autoregression of the first order.

    With curvature c, slope g, b = n beta, k = 1 + b c / gamma and step size s a step is

        d' = (1 - s k) d - s b g / gamma + noise of variance (1 - (1 - s)^2) / gamma

    so that after t steps from 0 the mean is -(1 - (1 - s k)^t) b g / (k gamma), and the variance
    (1 - (1 - s k)^(2 t)) (2 - s) / (2 - s k) / (k gamma). The rise is g d + c d^2 / 2.
    """
    quadratic = Quadratic(rng, **settings)
    curvatures, vectors = np.linalg.eigh(quadratic.hessian)
    slopes, k = quadratic.slope @ vectors, 1 + b * curvatures / gamma
    forgotten = (1 - step_size * k) ** np.arange(num_steps // 2 + 1, num_steps + 1)[:, None]
    means = -(1 - forgotten) * b * slopes / (k * gamma)
    variances = (1 - forgotten**2) * (2 - step_size) / (2 - step_size * k) / (k * gamma)
    rises = slopes * means + curvatures * (means**2 + variances) / 2
    expected = b * rises.sum(axis=1).mean()

    result = local_learning_coefficient(
        quadratic.model, quadratic.x, quadratic.y, gamma=gamma, inverse_temperature=b,
        num_steps=num_steps, step_size=step_size, num_chains=12, seed=0,
    )  # fmt: skip
    assert abs(result.value - expected) < 4 * result.stderr
    assert result.stderr < 0.1 * abs(expected)
    assert len(result.samples) == 12


def test_regular_minimum_has_half_its_number_of_weights():
    """With orthogonal inputs all curvatures are c: W / 2 but for gamma and the finite steps."""
    size, curvature, n_beta, gamma = 64, 2.0, 500.0, 1.0
    model = keras.Sequential([keras.Input((size,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    x = math.sqrt(size) * np.eye(size, dtype="float32")
    k = 1 + n_beta * curvature / gamma
    result = local_learning_coefficient(
        model, x, model.predict_on_batch(x), gamma=gamma, inverse_temperature=n_beta,
        step_size=0.2 / k, num_chains=8, num_steps=60, seed=0,
    )  # fmt: skip
    # Of the start, 0.8^60 is left. Steps of 0.2 / k instead of infinitely short ones multiply the
    # variance by 2 / 1.8, and gamma takes 1 / k of it.
    assert abs(result.value - size / 2 * (2 - 0.2 / k) / 1.8 * (1 - 1 / k)) < 4 * result.stderr
    assert result.stderr < 0.05 * size / 2


def test_singular_minimum_has_less():
    """At the minimum of w^4 it is 1/4 for each weight as gamma goes to 0, and not 1/2."""
    size, n_beta, gamma, step_size = 40, 1e3, 1.0, 5e-4
    model = keras.Sequential([keras.Input((1,)), layers.Dense(size, "linear", use_bias=False)])
    model.set_weights([np.zeros((1, size))])
    grid = np.linspace(-2, 2, 40_001)
    density = np.exp(-n_beta * grid**4 - gamma / 2 * grid**2)
    expected = size * n_beta * np.sum(grid**4 * density) / np.sum(density)
    assert expected == pytest.approx(size / 4, rel=0.05)
    result = local_learning_coefficient(
        model, np.ones((2, 1)), np.zeros(2), loss=_sum_of_fourth_powers, gamma=gamma,
        inverse_temperature=n_beta, step_size=step_size, num_chains=8, num_steps=200, seed=0,
    )  # fmt: skip
    # Steps of this length instead of infinitely short ones add 4 %, by 400,000 chains of NumPy.
    assert abs(result.value - expected) < 4 * result.stderr + 0.04 * expected
    assert result.stderr < 0.05 * expected


def _sum_of_fourth_powers(_, y_pred):
    return keras.ops.sum(y_pred**4, axis=-1)


def test_temperature_is_by_default_that_of_the_examples(rng):
    """n / ln(n), of the examples that are measured, however they come."""
    x, y = rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, 4, 12)
    model, few = classifier(), {"num_steps": 3, "num_chains": 1, "gamma": 1.0, "seed": 0}
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    for data, count, others in (
        ((x, y), 12, {}), ((batches,), 12, {}), ((x, y), 5, {"num_examples": 5}),
    ):  # fmt: skip
        result = local_learning_coefficient(model, *data, **others, **few)
        expected = local_learning_coefficient(
            model, *data, inverse_temperature=count / math.log(count), **others, **few
        )
        assert result.value == pytest.approx(expected.value, rel=1e-6)
        assert math.isnan(result.stderr)  # of a single chain


@pytest.mark.slow
def test_digits_at_the_defaults(digits):
    """Chains of the default steps stay near the weights of a small network that is trained."""
    x, y = digits[0][:500], digits[1][:500]
    model = keras.Sequential([keras.Input((64,)), layers.Dense(32, "relu"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, 0.9), loss)
    model.fit(x, y, epochs=30, verbose=0)
    result = local_learning_coefficient(model, x, y, num_chains=2, chunk_size=500, seed=0)
    assert 4 * result.stderr < result.value < 20


def test_chains_that_diverge_are_reported(rng):
    quadratic = Quadratic(rng, fitted=True)
    with pytest.warns(UserWarning, match="The chains must not diverge. Received: step_size=1.0"):
        result = local_learning_coefficient(
            quadratic.model, quadratic.x, quadratic.y, gamma=1e-3, step_size=1.0, num_chains=2
        )
    assert not math.isfinite(result.value) and math.isnan(result.stderr)
