"""gamma-hat of losses that vanish in float32, against extended precision."""

import itertools

import mpmath
import numpy as np
import pytest
from keras import layers
from measuring import measure
from nets import NUM_CLASSES, binary_from_logits, classifier, from_logits, misfits, sequential
from oracles import EPSILON32, binary_log_loss_of, ln_xi, log_loss_of, rounding, rows_of_losses

from keras_infomcr.layers import LogitNormalization


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def dyadic(rng, *shape):
    """Return multiples of 1/8 up to 1, of which float32 makes exact logits."""
    return rng.integers(-8, 9, shape) / 8


def extended_ln_xi(x, at_logits):
    """Return ln|J J^T| of a linear model with bias, rows x (+) 1 times dl/dlogits, by mpmath."""
    n = len(x)
    gram = mpmath.matrix(n)
    for i, j in itertools.product(range(n), repeat=2):
        inner = sum(a * b for a, b in zip(at_logits[i], at_logits[j]))
        gram[i, j] = inner * (mpmath.mpf(float(x[i] @ x[j])) + 1)
    logarithm = mpmath.mpf(0)
    for k in range(n):  # Gaussian elimination: its pivots are positive, and no scale too small
        logarithm += mpmath.log(gram[k, k])
        for i, j in itertools.product(range(k + 1, n), repeat=2):
            gram[i, j] -= gram[i, k] / gram[k, k] * gram[k, j]
    return logarithm


def categorical_case(rng):
    x, y = dyadic(rng, 8, 10), rng.integers(0, 5, 8)
    kernel, bias = 1000 * dyadic(rng, 10, 5), 1000 * dyadic(rng, 5)
    logits = x @ kernel + bias
    y[:6] = logits[:6].argmax(axis=1)  # six fitted as after training, two at random
    at_logits = []
    for row, c in zip(logits, y):
        powers = [mpmath.exp(float(z)) for z in row]
        p = [power / sum(powers) for power in powers]
        # p_c - 1 written as the sum of the others, of which nothing cancels.
        p[c] = -sum(q for k, q in enumerate(p) if k != c)
        at_logits.append(p)
    return x, y, kernel, bias, at_logits


def binary_case(rng):
    x, y = dyadic(rng, 8, 10), rng.integers(0, 2, 8)
    kernel, bias = 1000 * dyadic(rng, 10, 1), 1000 * dyadic(rng, 1)
    logits = (x @ kernel + bias)[:, 0]
    y[:6] = logits[:6] > 0
    signs = [-1 if label else 1 for label in y]
    at_logits = [[s / (1 + mpmath.exp(-s * float(z)))] for s, z in zip(signs, logits)]
    return x, y, kernel, bias, at_logits


@pytest.mark.parametrize("ending", ["logits", "probabilities"])
@pytest.mark.parametrize("case", [categorical_case, binary_case])
@misfits
def test_saturation_against_extended_precision(rng, case, ending):
    """Logits times 1000: the losses are exp(-1000) and their gradients 0 in float32."""
    x, y, kernel, bias, at_logits = case(rng)
    with mpmath.workdps(60):
        expected = float(extended_ln_xi(x, at_logits))
        log_losses = 2 * sum(mpmath.log(max(abs(a) for a in row)) for row in at_logits)
    categorical = case is categorical_case
    activation, loss = None, from_logits() if categorical else binary_from_logits()
    if ending == "probabilities":
        activation = "softmax" if categorical else "sigmoid"
        loss = "sparse_categorical_crossentropy" if categorical else "binary_crossentropy"
    model = sequential(layers.Dense(kernel.shape[1], activation), inputs=(10,), loss=loss)
    model.set_weights([kernel, bias])
    result = measure(model, x, y)
    # The logits are exact in float32, so the log-odds are right to float64's last digits.
    assert result.log_loss_part == pytest.approx(float(log_losses), rel=1e-12)
    # The rows grad m are x times softmax weights, rounded to float32 once or twice.
    weights = np.array([[float(a / max(map(abs, row))) for a in row] for row in at_logits])
    with_bias = np.hstack([x, np.ones((8, 1))])
    rows = (with_bias[:, :, None] * weights[:, None, :]).reshape(8, -1)
    tolerance = rounding(rows, EPSILON32, depth=2)
    assert tolerance < 1e-3
    assert result.value == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("case", [categorical_case, binary_case])
def test_naive_form_fails_at_saturation(rng, case):
    """Gradients of float32 losses vanish: the test above does not pass by luck."""
    x, y, kernel, bias, at_logits = case(rng)
    with mpmath.workdps(60):
        expected = float(extended_ln_xi(x, at_logits))
    model = sequential(layers.Dense(kernel.shape[1]), inputs=(10,))
    model.set_weights([kernel, bias])
    losses_of = log_loss_of(y) if case is categorical_case else binary_log_loss_of(y)
    rows = rows_of_losses(model, x, losses_of)
    with np.errstate(divide="ignore"):
        assert ln_xi(rows) != pytest.approx(expected, rel=0.1)


def test_normalised_logits_in_float32_agree_with_float64(data, request):
    """Logits of norm 25 put p_c within 1e-8 of 1, where float32 has no digits left."""
    model = classifier()
    single = measure(model, *data, normalize_softmax=True).value
    request.getfixturevalue("float64")
    double = classifier()
    double.set_weights(model.get_weights())
    expected = measure(double, *data, normalize_softmax=True).value
    normalised = sequential(*double.layers, LogitNormalization(1.0))
    rows = rows_of_losses(normalised, data[0], log_loss_of(data[1]))
    # 12 log-odds err by some 10 roundings of 25, the rows by as many of softmax's argument.
    tolerance = 2 * 12 * 10 * 25 * EPSILON32 + rounding(rows, EPSILON32, depth=25)
    assert single == pytest.approx(expected, abs=tolerance)
    assert tolerance < 0.1
