"""gamma-hat in training mode, in chunks, against SVD and the reference's code."""

import numpy as np
import pytest
from keras import layers, ops
from measuring import measure
from nets import (
    NUM_CLASSES,
    binary_from_logits,
    classifier,
    of_batch_normalization,
    of_convolutions,
    of_integers,
    sequential,
)
from oracles import EPSILON32, binary_log_loss_of, ln_xi, log_loss_of, rounding, rows_of_losses

from keras_infomcr.flatness import GammaHat
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def value_of_the_reference_code(model, x, y, trials, scale=None):
    """Return what src/eval_cifar10.py of InfoMCR does with batches of 10 images.

    The mean over trials of the sum of ln singular values of the Jacobian of all losses, the
    model called in training mode on chunks of 10.
    """

    def losses(logits, labels):
        if scale is not None:
            logits = logits / (ops.norm(logits, axis=-1, keepdims=True) * scale)
        return ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)

    sums = []
    for rows in trials:
        chunks = rows.reshape(-1, 10)
        jacobians = [
            rows_of_losses(model, x[c], lambda z, c=c: losses(z, y[c]), training=True)
            for c in chunks
        ]
        sums.append(np.sum(np.log(np.linalg.svd(np.concatenate(jacobians), compute_uv=False))))
    return np.mean(sums)


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (of_batch_normalization, 0.5),
        pytest.param(of_convolutions, None, marks=pytest.mark.slow),
    ],
)
def test_training_in_chunks_of_10_is_the_reference_codes_convention(float64, rng, make, scale):
    x, y = rng.normal(size=(40, 6)), rng.integers(0, NUM_CLASSES, 40)
    model = make()
    settings = TrialSettings(
        num_examples=20,
        num_trials=2,
        normalize_softmax=scale is not None,
        softmax_scale=scale or 0.04,
        training=True,
        chunk_size=10,
        seed=0,
    )
    estimator = GammaHatEstimator(model, x, y, settings)
    result = GammaHat.of_parts(estimator.measure())
    expected = value_of_the_reference_code(model, x, y, estimator._trials, scale)
    assert result.value / 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "inputs_of"),
    [(of_batch_normalization, np.float32), (of_integers, lambda x: np.digitize(x, [-1, 0, 1]))],
)
def test_training_in_float32(data, make, inputs_of):
    x, y = inputs_of(data[0][:8]), data[1][:8]
    model = make()
    rows = rows_of_losses(model, x, log_loss_of(y), training=True)
    # Batch normalisation divides differences of like size: some 50 roundings in all.
    tolerance = rounding(rows, EPSILON32, depth=50)
    assert measure(model, x, y, training=True).value == pytest.approx(ln_xi(rows), abs=tolerance)
    assert tolerance < 0.1


def test_binary_loss_in_training_mode_against_svd(float64, data):
    x, y = data[0], data[1] % 2
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.Activation("tanh")]
    model = sequential(*stack, layers.Dense(1), loss=binary_from_logits())
    expected = ln_xi(rows_of_losses(model, x, binary_log_loss_of(y), training=True))
    assert measure(model, x, y, training=True).value == pytest.approx(expected, rel=1e-9)


def test_chunks_do_not_change_the_value_where_no_layer_couples_them(float64, data):
    model = classifier()
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    for training, chunk_size in ((False, 1), (False, 100), (True, 5), (True, None)):
        result = measure(model, *data, training=training, chunk_size=chunk_size)
        assert result.value == pytest.approx(expected, rel=1e-9)
