"""The Fisher-Rao norm against gradients of single examples and the closed form of ReLU networks."""

import numpy as np
import pytest
from frameworks import BACKEND, jacobian, numpy
from keras import layers, ops
from measuring import assert_untouched, in_batches, softmax
from nets import (
    NUM_CLASSES,
    binary_from_logits,
    classifier,
    compiled,
    misfits,
    of_batch_normalization,
    of_convolutions,
    of_dict_inputs,
    sequential,
)

from keras_infomcr.flatness import fisher_rao_norm

# Each example's number is made of a handful of sums of float32.
ROUNDING = 1e-5


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def eagerly(model):
    model.run_eagerly = BACKEND != "jax"
    return model


def in_a_loop(model, x, scores):
    """Return <w, grad s>^2 of scores `[N, K]` of the outputs, by rows of gradients."""
    weights = np.concatenate([numpy(v).ravel() for v in model.trainable_variables])
    rows = jacobian(lambda: ops.reshape(scores(model(x)), (-1,)), model.trainable_variables)
    return (rows @ weights.astype("float64")).reshape(len(x), -1) ** 2


@pytest.mark.parametrize(
    "make",
    [
        classifier,
        pytest.param(of_batch_normalization, marks=pytest.mark.slow),
        pytest.param(of_convolutions, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_single_examples(data, make):
    x, y = data
    model = eagerly(make())
    squares = in_a_loop(model, x, ops.log_softmax)  # of each label that there may be
    p = softmax(numpy(model(x)).astype("float64"))
    for labels, expected in (("model", np.sum(p * squares, 1)), ("data", squares[range(12), y])):
        result = fisher_rao_norm(model, x, y, labels=labels, chunk_size=5)
        np.testing.assert_allclose(result.samples**2, expected, rtol=1e-3, atol=1e-6)
        assert result.value**2 == pytest.approx(expected.mean(), rel=1e-3)
        # The delta method, of the root of a mean.
        stderr = expected.std(ddof=1) / np.sqrt(12) / (2 * np.sqrt(expected.mean()))
        assert result.stderr == pytest.approx(stderr, rel=1e-3)


@pytest.mark.parametrize("depth", [0, 2])
def test_closed_form_of_relu_networks_without_biases(data, depth):
    """<w, grad z> = (L + 1) z, for z is homogeneous in each layer's weights."""
    x, y = data
    stack = [layers.Dense(8, "relu", use_bias=False) for _ in range(depth)]
    model = eagerly(sequential(*stack, layers.Dense(NUM_CLASSES, use_bias=False)))
    hidden = x.astype("float64")
    *kernels, last = (numpy(v).astype("float64") for v in model.variables)
    for kernel in kernels:
        hidden = np.maximum(hidden @ kernel, 0)
    z = hidden @ last
    p = softmax(z)
    mean = np.sum(p * z, axis=1)
    variance = np.sum(p * (z - mean[:, None]) ** 2, axis=1)
    for labels, squares in (("model", variance), ("data", (mean - z[range(12), y]) ** 2)):
        result = fisher_rao_norm(model, x, y, labels=labels)
        expected = (depth + 1) * np.sqrt(squares.mean())
        assert result.value == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@misfits
def test_nothing_cancels_where_one_class_is_certain(data, scale):
    """Two classes of logits z and 0 have the variance p (1 - p) z^2, however near p is to 1."""
    x, y = abs(data[0]), data[1]
    model = eagerly(sequential(layers.Dense(2, use_bias=False)))
    kernel = scale * np.stack([np.ones(6), np.zeros(6)], axis=1)
    model.set_weights([kernel])
    z = x.astype("float64") @ kernel[:, 0]
    factor = np.exp(-np.logaddexp(0, z) - np.logaddexp(0, -z))
    result = fisher_rao_norm(model, x, y % 2)
    # A sum of six positive numbers in float32 is right to 6 times 6e-8; it is an exponent here.
    rtol = 4e-7 * (1 + z.max())
    np.testing.assert_allclose(result.samples, np.sqrt(factor) * z, rtol=rtol)
    one = eagerly(sequential(layers.Dense(1, use_bias=False), loss=binary_from_logits()))
    one.set_weights([kernel[:, :1]])
    np.testing.assert_allclose(fisher_rao_norm(one, x, y % 2).samples, result.samples, rtol=rtol)
    residual = np.exp(-np.logaddexp(0, (2 * (y % 2) - 1) * z))
    by_labels = fisher_rao_norm(one, x, y % 2, labels="data")
    np.testing.assert_allclose(by_labels.samples, residual * z, rtol=rtol)


def test_probabilities_are_taken_for_what_they_are_made_of(data):
    x, y = data
    model = eagerly(classifier())
    other = eagerly(classifier("sparse_categorical_crossentropy", activation="softmax"))
    other.set_weights(model.get_weights())
    expected = fisher_rao_norm(model, x, y).value
    assert fisher_rao_norm(other, x, y).value == pytest.approx(expected, rel=ROUNDING)
    inverted = sequential(other, layers.Rescaling(1.0), loss="sparse_categorical_crossentropy")
    with pytest.warns(UserWarning, match="does not end in a softmax or sigmoid"):
        found = fisher_rao_norm(inverted, x, y).value
    # ln p of float32, whose slopes are divided by p.
    assert found == pytest.approx(expected, rel=1e-4)


def test_data_in_batches_and_dictionaries(data):
    x, y = data
    model = eagerly(classifier())
    whole, batches = fisher_rao_norm(model, x, y), fisher_rao_norm(model, in_batches(x, y))
    np.testing.assert_allclose(batches.samples, whole.samples, rtol=ROUNDING)
    model = eagerly(compiled(of_dict_inputs()))
    assert fisher_rao_norm(model, {"a": x, "b": x}, y, num_examples=7, seed=0).samples.shape == (7,)


def test_the_model_is_left_as_it_was():
    assert_untouched(fisher_rao_norm)


def test_bad_arguments(data):
    with pytest.raises(
        ValueError, match=r"`labels` must be one of 'model', 'data'\. Received: lab"
    ):
        fisher_rao_norm(classifier(), *data, labels="true")
    with pytest.raises(ValueError, match="`chunk_size` must be an integer of at least 1"):
        fisher_rao_norm(classifier(), *data, chunk_size=0)
    regression = sequential(layers.Dense(1), loss="mse")
    with pytest.raises(
        ValueError, match=r"The loss must be one softmax cross-entropy .* loss='mse'"
    ):
        fisher_rao_norm(regression, data[0], data[1].astype("float32"))
    with pytest.raises(ValueError, match="Labels are needed"):
        fisher_rao_norm(classifier(), data[0])
