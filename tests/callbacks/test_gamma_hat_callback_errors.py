"""What `GammaHatCallback` refuses, before any weight changes."""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array
from keras import layers
from measured_nets import DRAW, NAN, NUM_CLASSES, classifier, compiled, dataset

from keras_infomcr import GammaHatCallback
from keras_infomcr.callbacks import FlatnessCallback


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


def test_data_and_labels_in_two_arguments(data):
    message = r"`data` must be one tuple `\(x, y\)`\. Received: data of type .* Put parentheses"
    for labels in (data[1], array(data[1])):
        with pytest.raises(ValueError, match=message):
            GammaHatCallback(data[0], labels)
        with pytest.raises(ValueError, match=message):
            FlatnessCallback(data[0], labels, ["hessian_trace"])


def test_a_loss_that_is_no_cross_entropy_is_told_at_the_beginning(data):
    model = classifier()
    model.compile("sgd", "mse")
    with pytest.raises(UserWarning, match="It is no gamma-hat of a classifier"):
        model.fit(data[0], np.eye(NUM_CLASSES)[data[1]], callbacks=[
            GammaHatCallback((data[0], np.eye(NUM_CLASSES)[data[1]]), **DRAW)
        ])  # fmt: skip
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequency": 0}, "`frequency` must be an integer of at least 1. Received: frequency=0"),
        ({"frequency": 1.5}, "`frequency` must be an integer of at least 1."),
        ({"verbose": 2}, "`verbose` must be one of 0, 1. Received: verbose=2"),
        ({"verbose": "auto"}, "`verbose` must be one of 0, 1. Received: verbose='auto'"),
        ({"num_examples": 0}, "`num_examples` must be an integer of at least 1."),
        ({"num_trials": None}, "`num_trials` must be an integer of at least 1."),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        ({"softmax_scale": -1}, "`softmax_scale` must be a finite number greater than 0."),
        ({"training": None}, "`training` must be `True` or `False`. Received: training=None"),
        ({"normalize_softmax": 1}, "`normalize_softmax` must be `True` or `False`."),
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GammaHatCallback(data, **arguments)


def with_nan(x):
    x = x.copy()
    x[2] = NAN
    return x


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda x, y: (with_nan(x), y), {}, ValueError, "`x` must be finite."),
        (lambda x, y: (x, y + 3), {}, ValueError, "`y` must hold integers from 0 to 3"),
        (lambda x, y: (x, y[:7]), {}, ValueError, "the same number of examples."),
        (lambda x, y: (x, y), {"num_examples": 21}, ValueError, "`num_examples` must not exceed"),
        (lambda x, y: (x, None), {}, ValueError, "Labels are needed."),
        (lambda x, y: (x,), {}, ValueError, "Labels are needed."),
        (lambda x, y: x, {}, ValueError, "Labels are needed."),
        (lambda x, y: None, {}, TypeError, "must be an array"),
        (lambda x, y: dataset(x, y), {}, ValueError,
         "The data must come in batches."),
    ],
    ids=["nan", "labels", "lengths", "too few", "y is None", "tuple of x", "x", "None",
         "unbatched"],
)  # fmt: skip
def test_errors_come_before_any_weight_changes(data, make, arguments, error, message):
    callback = GammaHatCallback(make(*data), **{**DRAW, **arguments})
    assert_refused_before_training(classifier(), data, callback, error, message)


def test_labels_of_a_model_that_is_not_built_are_checked_as_soon_as_it_is(data):
    model = compiled(keras.Sequential([layers.Dense(NUM_CLASSES)]))
    callback = GammaHatCallback((data[0], data[1] + 3), **DRAW)
    message = "`y` must hold integers from 0 to 3"
    # TensorFlow builds it in the first step, the others before.
    num_steps = 1 if BACKEND == "tensorflow" else 0
    assert_refused_before_training(model, data, callback, ValueError, message, num_steps)


def assert_refused_before_training(model, data, callback, error, message, num_steps=0):
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    with pytest.raises(error, match=re.escape(message)):
        model.fit(*data, batch_size=5, callbacks=[count, callback], verbose=0)
    assert len(steps) == num_steps


def test_model_without_a_loss(data):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.ActivityRegularization(1.0)(layers.Dense(4)(inputs)))
    model.compile("sgd")
    with pytest.raises(
        ValueError, match="must be compiled with a loss, or the measure be given one"
    ):
        model.fit(*data, callbacks=[GammaHatCallback(data, **DRAW)], verbose=0)
