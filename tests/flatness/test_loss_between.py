"""The loss between two models, against closed forms and plain loops."""

import re

import keras
import numpy as np
import pytest
from frameworks import numpy
from measuring import Quadratic, assert_untouched
from nets import NUM_CLASSES, Subclassed, classifier, compiled, from_logits, sequential

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness import loss_between, plot

layers = keras.layers


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def eager(model):
    """Return a model that is not compiled anew for each test."""
    model.run_eagerly = True
    return model


def with_batch_norm():
    stack = [layers.Dense(5, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    model = eager(sequential(*stack, layers.Dense(NUM_CLASSES)))
    norm = model.layers[1]
    norm.moving_mean.assign(np.random.normal(size=5))
    norm.moving_variance.assign(np.random.uniform(0.5, 2, 5))
    return model


def loss_and_error(model, x, y):
    """Return the mean cross-entropy and the fraction of wrong answers of a classifier."""
    logits = numpy(model(x)).astype("float64")
    logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return -np.mean(logs[np.arange(len(y)), y]), np.mean(logits.argmax(axis=1) != y)


def interpolated(model, other, a):
    return [(1 - a) * v + a * w for v, w in zip(model.get_weights(), other.get_weights())]


# ---------------------------------------------------------------- the line


def test_line_between_minima_of_a_quadratic_loss_is_its_closed_form(float64, rng):
    """It is convex, so that there is no barrier, and the ends are the models."""
    quadratic = Quadratic(rng)
    other = keras.models.clone_model(quadratic.model)
    step = rng.normal(size=8)
    other.set_weights(
        [(quadratic.weights + step)[:6].reshape(3, 2), (quadratic.weights + step)[6:]]
    )
    result = loss_between(quadratic.model, other, quadratic.x, quadratic.y, num_points=5)
    expected = quadratic.loss + quadratic.rises(np.linspace(0, 1, 5)[:, None] * step)
    # Sums of some hundred terms of about the size of their result, each rounded to 1e-16.
    np.testing.assert_allclose(result.losses, expected, rtol=1e-12)
    np.testing.assert_array_equal(result.coordinates, np.linspace(0, 1, 5))
    assert result.barrier == 0 and np.isnan(result.error_barrier)


def test_no_barrier_between_a_model_and_itself(data):
    model = with_batch_norm()
    result = loss_between(model, model, *data, num_points=3)
    assert np.ptp(result.losses) == np.ptp(result.errors) == 0
    assert result.barrier == result.error_barrier == 0


@pytest.fixture
def permuted_copies(data):
    """Return two models that compute one function, and data that both fit."""
    model, other = eager(classifier()), classifier()
    kernel, bias, last, last_bias = model.get_weights()
    model.set_weights([20 * kernel, bias, 20 * last, last_bias])
    order = np.roll(np.arange(8), 1)
    other.set_weights([20 * kernel[:, order], bias[order], 20 * last[order], last_bias])
    return model, other, data[0], numpy(model(data[0])).argmax(axis=-1)


def test_barrier_between_permuted_copies_of_one_network(permuted_copies):
    result = loss_between(*permuted_copies, num_points=5)
    np.testing.assert_allclose(result.losses[0], result.losses[-1], rtol=1e-4)  # float32
    assert result.errors[0] == result.errors[-1] == 0
    # Between equal ends the barrier is the greatest rise.
    assert result.barrier == pytest.approx(result.losses.max() - result.losses[0], rel=1e-3)
    assert result.barrier > 10 * result.losses[0]
    assert result.error_barrier == result.errors.max() > 0.1


def test_barrier_is_measured_from_the_line_between_the_ends(data):
    model, other = eager(classifier()), classifier()
    result = loss_between(model, other, *data, num_points=5)
    heights = [
        loss - ((1 - a) * result.losses[0] + a * result.losses[-1])
        for a, loss in zip((0, 0.25, 0.5, 0.75, 1), result.losses)
    ]
    assert result.barrier == pytest.approx(max(heights), abs=1e-12)
    assert abs(result.losses[0] - result.losses[-1]) > 0.05


# ---------------------------------------------------------------- batch normalisation


@pytest.mark.parametrize("reestimate", [True, False])
def test_line_is_that_of_a_plain_loop(float64, data, reestimate):
    model, other, between = with_batch_norm(), with_batch_norm(), with_batch_norm()
    result = loss_between(model, other, *data, num_points=4, reestimate=reestimate, chunk_size=5)
    for a, loss, error in zip(np.linspace(0, 1, 4), result.losses, result.errors):
        between.set_weights(interpolated(model, other, a))
        if reestimate:
            hidden = data[0] @ between.get_weights()[0]
            between.layers[1].moving_mean.assign(hidden.mean(axis=0))
            between.layers[1].moving_variance.assign(hidden.var(axis=0))
        expected = loss_and_error(between, *data)
        # Sums in another order in float64, but for the error, which is in float32.
        assert loss == pytest.approx(expected[0], rel=1e-9)
        assert error == pytest.approx(expected[1], abs=1e-6)


# ---------------------------------------------------------------- two models


def test_frozen_weights_are_interpolated_too(data):
    model, other = eager(classifier()), eager(classifier())
    model.layers[0].trainable = False
    result = loss_between(model, other, *data, num_points=3)
    between = classifier()
    for a, loss in zip((0, 0.5, 1), result.losses):
        between.set_weights(interpolated(model, other, a))
        assert loss == pytest.approx(loss_and_error(between, *data)[0], rel=1e-5)


def functional(base, name):
    inputs = keras.Input((6,))
    hidden = layers.Dropout(0.5)(layers.Dense(5, "tanh", name=name)(inputs))
    return base(inputs, layers.Dense(NUM_CLASSES)(hidden))


def test_names_and_classes_of_the_models_may_differ(data):
    model = eager(compiled(functional(RegularizedModel, "one"), from_logits()))
    other = functional(keras.Model, "another")
    result = loss_between(model, other, *data, num_points=3)
    model.set_weights(other.get_weights())
    assert result.losses[-1] == pytest.approx(loss_and_error(model, *data)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: "weights", TypeError, "The other model must be a `keras.Model`. Received: other="),
        (Subclassed.__bases__[0], ValueError, "The other model must be built. Received: other="),
        (lambda: sequential(layers.Dense(7), layers.Dense(NUM_CLASSES)), ValueError,
         "layers 0 (from 0) differ: Dense with weights of shapes [(6, 8), (8,)], and Dense with "
         "weights of shapes [(6, 7), (7,)]."),
        (lambda: sequential(layers.Dense(8), layers.Dropout(0.1), layers.Dense(NUM_CLASSES)),
         ValueError, "layers 1 (from 0) differ: Dense"),
        (lambda: sequential(layers.Dense(8)), ValueError, "and none. Build them by the same"),
    ],
)  # fmt: skip
def test_models_must_be_of_one_architecture(data, other, error, message):
    with pytest.raises(error, match=re.escape(message)):
        loss_between(eager(classifier()), other(), *data)


# ---------------------------------------------------------------- the rest


def test_model_and_seeds_are_untouched():
    """With itself as the other one, for another model could not be made without drawing."""
    assert_untouched(lambda model, x, y: loss_between(model, model, x, y, num_points=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": 2}, "`num_points` must be an integer of at least 3. Received: num_points="),
        ({"reestimate": None}, "`reestimate` must be `True` or `False`. Received: reestimate=None"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
    ],
)
def test_bad_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_between(classifier(), classifier(), *data, **arguments)


def test_line_is_drawn_with_its_barrier(permuted_copies):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    result = loss_between(*permuted_copies, num_points=5)
    axes = plot.loss_between(result)
    line, _, mark = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), result.losses)
    assert np.ptp(mark.get_ydata()) == pytest.approx(result.barrier)
    assert axes.get_title() == f"barrier {result.barrier:.3g}"
    own = pyplot.figure().add_subplot()
    assert plot.loss_between(result, own) is own
    pyplot.close("all")
    with pytest.raises(TypeError, match="`result` must be a `LossBetween`"):
        plot.loss_between(1)
