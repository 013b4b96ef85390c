"""Values of gamma-hat that are not finite, and what its warnings say."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
from keras import layers
from nets import NUM_CLASSES, classifier, sequential
from parameters import with_slow

from keras_infomcr.flatness import gamma_hat


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def measure_and_catch(model, x, y, **kwargs):
    settings = {"num_examples": 4, "num_trials": 3, "seed": 0, **kwargs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = gamma_hat(model, x, y, **settings)
    assert len(caught) == 1, [str(w.message) for w in caught]
    return result, str(caught[0].message)


@pytest.mark.parametrize("training", [False, True])
def test_duplicate_examples(data, training):
    x, y = np.repeat(data[0][:4], 3, axis=0), np.repeat(data[1][:4], 3)
    result, message = measure_and_catch(classifier(), x, y, num_examples=6, training=training)
    assert result.value == result.geometry_part == -np.inf
    assert math.isnan(result.stderr)
    assert np.isfinite(result.log_loss_part)
    assert re.fullmatch(
        r"gamma_hat is not finite: \d of the 6 examples of the trial have a gradient parallel to "
        r"an earlier one's, such as examples \d and \d: they are duplicates, or look alike to the "
        r"model\. Take duplicates out of the data, or lower `num_examples`\. The data hold 8 "
        r"copies of other examples among their 12: keep the first of each, whose "
        r"indices are `np\.unique\(x, axis=0, return_index=True\)\[1\]`\.",
        message,
    )


def test_the_advice_on_duplicates_makes_it_finite(data):
    x, y = np.repeat(data[0][:4], 3, axis=0), np.repeat(data[1][:4], 3)
    kept = np.unique(x, axis=0, return_index=True)[1]
    settings = {"num_examples": 4, "num_trials": 1}
    assert np.isfinite(gamma_hat(classifier(), x[kept], y[kept], **settings).value)


def test_examples_that_only_look_alike_are_no_copies(data):
    """The model cuts off what differs between them."""
    x, y = np.repeat(data[0][:1], 12, axis=0), np.zeros(12)
    x[:, 0] = np.arange(12)
    cut = layers.Reshape((6, 1)), layers.Cropping1D((1, 0)), layers.Flatten()
    model = sequential(*cut, layers.Dense(NUM_CLASSES))
    _, message = measure_and_catch(model, x, y)
    assert "look alike to the model" in message and "copies" not in message


@pytest.mark.parametrize("size", [1, 3])
def test_too_few_examples_are_told_how_many_to_ask_for(data, size):
    x, y = data[0][:size], data[1][:size]
    message = rf"Received: num_examples=4, {size} examples. Use `num_examples={size}`, or give more"
    with pytest.raises(ValueError, match=message):
        gamma_hat(classifier(), x, y, num_examples=4)


def test_a_loss_that_is_no_cross_entropy_is_no_gamma_hat_of_a_classifier(data):
    _, message = measure_and_catch(classifier(loss="mse"), data[0], np.eye(NUM_CLASSES)[data[1]])
    assert message == (
        "The loss is no cross-entropy, so that gamma_hat is ln|J J^T| of the gradients of the "
        "loss itself. It is no gamma-hat of a classifier, and does not compare with one. "
        "Received: loss='mse'"
    )


def test_warnings_point_at_the_users_line(data):
    x = np.repeat(data[0][:1], 2, axis=0)
    model = sequential(layers.Dense(4, "softmax"), layers.Rescaling(1.0),
                       loss="sparse_categorical_crossentropy")  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        gamma_hat(model, x, np.zeros(2), num_examples=2, num_trials=1)
    assert [w.filename for w in caught] == [__file__, __file__]


def test_one_singular_trial_among_others(data):
    x, y = data[0].copy(), data[1].copy()
    x[1], y[1] = x[0], y[0]
    settings = {"num_examples": 6, "num_trials": 2}
    model = classifier()
    for seed in itertools.count():  # until the two fall into one trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if np.any(np.isinf(gamma_hat(model, x, y, seed=seed, **settings).trials)):
                break
    result, _ = measure_and_catch(model, x, y, seed=seed, **settings)
    assert sorted(np.isinf(result.trials)) == [False, True]
    assert result.value == -np.inf
    assert math.isnan(result.stderr)


@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_fewer_weights_than_examples(data, policy, request):
    if policy == "float64":
        request.getfixturevalue("float64")
    model = sequential(layers.Dense(2, use_bias=False), inputs=(3,))
    result, message = measure_and_catch(model, data[0][:, :3], data[1] % 2, num_examples=7)
    assert result.value == -np.inf
    assert message == "gamma_hat is not finite: there are fewer weights (6) than examples (7)."


def test_examples_without_gradient(data):
    model = sequential(layers.Dense(NUM_CLASSES, use_bias=False))
    x = data[0].copy()
    x[:] = 0
    result, message = measure_and_catch(model, x, data[1])
    assert result.value == -np.inf
    assert message == "gamma_hat is not finite: examples 0, 1, 2, 3 have no gradient."


@pytest.mark.parametrize("bad", with_slow([np.nan, np.inf], np.inf))
@pytest.mark.parametrize(
    ("loss", "training"),
    [(None, False), (None, True), ("categorical_focal_crossentropy", False)],
)
def test_weights_that_are_not_finite(data, bad, loss, training):
    model = classifier(loss=loss)
    model.layers[0].kernel.assign(np.full((6, 8), bad))
    y = np.eye(NUM_CLASSES)[data[1]] if loss else data[1]
    result, message = measure_and_catch(model, data[0], y, training=training)
    assert math.isnan(result.value) and math.isnan(result.stderr)
    assert message.startswith("gamma_hat is not finite: gradients are not finite (examples ")


def test_overflowing_logits(data):
    """Weights of 1e38 are finite, their logits are not."""
    model = classifier()
    model.layers[1].kernel.assign(np.full((8, 4), 3e38))
    result, message = measure_and_catch(model, data[0], data[1])
    assert not math.isfinite(result.value)
    assert message.startswith("gamma_hat is not finite: ")
