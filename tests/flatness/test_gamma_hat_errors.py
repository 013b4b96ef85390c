"""What gamma-hat refuses, and what it says."""

import re

import keras
import numpy as np
import pytest
from frameworks import tensorflow
from keras import layers
from measuring import Batches, dataset, measure, ragged
from nets import NUM_CLASSES, Subclassed, binary_from_logits, classifier, compiled, sequential

from keras_infomcr.flatness import gamma_hat


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


def bare(*stack):
    return keras.Sequential([*stack, layers.Dense(NUM_CLASSES)])


def without_loss(model):
    model.compile("sgd")
    return model


def frozen():
    model = classifier()
    model.trainable = False
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model", TypeError, "`model` must be a `keras.Model`. Received: model='model'"),
        (lambda: keras.Model, TypeError, "`model` must be a `keras.Model`. Received: model=<class"),
        (lambda: bare(keras.Input((6,))), ValueError, "The model must be compiled with a loss, or"),
        (lambda: without_loss(bare(keras.Input((6,)))), ValueError,
         "or the measure be given one. Received: model=<Sequential"),
        (lambda: compiled(bare()), ValueError, "The model must be built"),
        (lambda: compiled(Subclassed()), ValueError, "The model must be built"),
        (frozen, ValueError, "have trainable weights. Received: model=<Sequential"),
        (lambda: sequential(layers.Dense(1)), ValueError,
         "a row of at least 2 class scores an example. Received: outputs of shape (1, 1)"),
        (lambda: sequential(layers.Reshape((3, 2))), ValueError, "trainable weights"),
    ],
    ids=["string", "class", "uncompiled", "no loss", "unbuilt", "unbuilt subclass", "frozen",
         "one score", "no weights"],
)  # fmt: skip
def test_bad_models(data, make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        measure(make(), *data)


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, np.nan])
def test_counts_out_of_range(data, value):
    for name in ("num_examples", "num_trials", "chunk_size"):
        text = f"`{name}` must be an integer of at least 1. Received: {name}={value!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            gamma_hat(classifier(), *data, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
        ({"seed": "a"}, "`seed` must be an integer of at least 0. Received: seed='a'"),
        ({"softmax_scale": 0}, "`softmax_scale` must be a finite number greater than 0. Received"),
        ({"softmax_scale": np.inf}, "`softmax_scale` must be a finite number greater than 0."),
        ({"softmax_scale": None}, "greater than 0. Received: softmax_scale=None"),
        ({"training": 1}, "`training` must be `True` or `False`. Received: training=1"),
        ({"normalize_softmax": "yes"}, "`normalize_softmax` must be `True` or `False`. Received"),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the "
                               "data. Received: num_examples=13, 12 examples"),
        ({}, "Received: num_examples=100, 12 examples"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gamma_hat(classifier(), *data, **arguments)


def test_arguments_are_keywords(data):
    with pytest.raises(TypeError, match="positional"):
        gamma_hat(classifier(), *data, 4)


@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy"])
def test_normalisation_needs_a_softmax(data, loss):
    text = "`normalize_softmax` needs a model compiled with one softmax cross-entropy. Received: "
    with pytest.raises(ValueError, match=text):
        measure(classifier(loss=loss), *data, normalize_softmax=True)


def test_training_mode_needs_a_cross_entropy(data):
    text = "`training` must be `False` unless the loss is a cross-entropy of one output. Received: "
    with pytest.raises(ValueError, match=text):
        measure(classifier(loss="mse"), data[0], np.eye(NUM_CLASSES)[data[1]], training=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite(data, bad):
    x = data[0].astype("float32")
    x[3, 2] = x[7, 0] = x[7, 1] = bad
    text = "`x` must be finite. Received: NaN or infinity in example 3 and 1 others"
    with pytest.raises(ValueError, match=text):
        measure(classifier(), x, data[1])
    with pytest.raises(ValueError, match=text):
        gamma_hat(classifier(), dataset(x, data[1]), num_examples=4, num_trials=3)


@pytest.mark.parametrize("shape", [(12,), (12, NUM_CLASSES)])
def test_labels_that_are_not_finite_are_refused(data, shape):
    y = np.zeros(shape)
    y[3] = np.nan
    text = "`y` must be finite. Received: NaN or infinity in example 3 and 0 others"
    with pytest.raises(ValueError, match=re.escape(text)):
        measure(classifier(), data[0], y)


@pytest.mark.parametrize(
    "labels",
    [
        lambda y: y - 0.5 * (y > 0),
        lambda y: np.eye(5)[y],
        lambda y: np.zeros((12, NUM_CLASSES)),
        lambda y: np.stack([y, y], axis=1),
        lambda y: np.array(list("abc") * 4),
    ],
    ids=["fractions", "width", "empty rows", "two", "strings"],
)
def test_labels_that_do_not_fit_the_classes(data, labels):
    y = labels(np.resize(np.arange(NUM_CLASSES), 12))
    text = re.escape(
        "`y` must hold integers from 0 to 3, or rows of 4 probabilities. Received: y of shape "
        f"{y.shape} and dtype {y.dtype}"
    )
    with pytest.raises(ValueError, match=text):
        measure(classifier(), data[0], y)


@pytest.mark.parametrize(
    "labels",
    [[-1, 1], [0, 2], [[0, 1], [1, 0]], ["a", "b"]],
    ids=["signs", "two", "one-hot", "strings"],
)
def test_labels_that_do_not_fit_binary_cross_entropy(data, labels):
    y = np.array(labels)
    text = re.escape(
        "`y` must hold one number from 0 to 1 an example. Received: y of shape "
        f"{y.shape} and dtype {y.dtype}"
    )
    model = sequential(layers.Dense(1), loss=binary_from_logits())
    with pytest.raises(ValueError, match=text):
        measure(model, data[0][:2], y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: (x, None), ValueError, "Labels are needed. Received: y=None."),
        (lambda x, y: ({"a": x}, None), ValueError, "Labels are needed. Received: y=None."),
        (lambda x, y: (dataset(x, y), y), ValueError,
         "`y` must be `None` where `x` gives batches `(x, y)`. Received: x=<_BatchDataset"),
        (lambda x, y: (Batches(x, y, 3), y), ValueError, "`y` must be `None` where `x` gives"),
        (lambda x, y: (tensorflow().data.Dataset.from_tensor_slices((x, y)), None), ValueError,
         "The data must come in batches. Received: an element"),
        (lambda x, y: (tensorflow().data.Dataset.from_tensor_slices(x).batch(5), None), ValueError,
         "Labels are needed. Received: batches of x alone."),
        (lambda x, y: (iter([]), None), ValueError, "The data must not be empty."),
        (lambda x, y: (x, y[:11]), ValueError,
         "must hold the same number of examples. Received: shapes [(12, 6), (11,)]"),
        (lambda x, y: (x, y[0]), ValueError, "must hold the same number of examples."),
        (lambda x, y: ({"a": x, "b": x[:3]}, y), ValueError, "the same number of examples."),
        (lambda x, y: (x.astype(object), y), TypeError, "must be dense arrays. Received: an array"),
        (lambda x, y: (ragged(2), y[:2]), TypeError,
         "must be an array, a structure of arrays, or an iterable of batches"),
        (lambda x, y: (dataset(ragged(12), y), None), TypeError,
         "must be dense arrays. Received: an array"),
        (lambda x, y: (3, y), TypeError, "`x` must be an array, a structure of arrays, or"),
        (lambda x, y: (None, y), TypeError, "Received: x=None (of type <class 'NoneType'>)"),
    ],
    ids=["no labels", "dict without labels", "dataset and y", "PyDataset and y", "unbatched",
         "batches of x", "empty", "lengths", "scalar label", "lengths in a dict", "objects",
         "ragged", "ragged batches", "number", "None"],
)  # fmt: skip
def test_bad_data(data, make, error, message):
    x, y = make(data[0].astype("float32"), data[1])
    with pytest.raises(error, match=re.escape(message)):
        gamma_hat(classifier(), x, y, num_examples=2, num_trials=2)
