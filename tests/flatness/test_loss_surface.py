"""The loss on lines and planes, against closed forms and plain loops."""

import dataclasses
import re

import keras
import numpy as np
import pytest
from frameworks import numpy
from measuring import Quadratic, assert_untouched, in_batches
from nets import NUM_CLASSES, compiled, from_logits, of_convolutions, sequential

from keras_infomcr.flatness import loss_surface, plot
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.surface.directions import directions_of

layers = keras.layers


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


def eager(model):
    """Return a model that is not compiled anew for each test."""
    model.run_eagerly = True
    return model


def linear():
    return eager(sequential(layers.Dense(NUM_CLASSES, bias_initializer="normal")))


def plain_loss(model, x, y):
    return float(numpy(model.loss(y, model(x))))


def parts(vector, model):
    """Return a vector as arrays like the trainable variables."""
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    return [p.reshape(shape) for p, shape in zip(np.split(vector, ends), shapes)]


# ---------------------------------------------------------------- the grid


def test_plane_through_a_quadratic_loss_is_its_closed_form(float64, rng):
    """Both directions, a finer grid than the ends, and the orientation are in it."""
    quadratic = Quadratic(rng)
    directions = rng.normal(size=(2, 8))
    result = loss_surface(
        quadratic.model, quadratic.x, quadratic.y, directions=directions, span=(-1, 2), num_points=4
    )
    np.testing.assert_allclose(result.coordinates, [-1, 0, 1, 2], atol=1e-15)
    steps = [a * directions[0] + b * directions[1] for a in (-1, 0, 1, 2) for b in (-1, 0, 1, 2)]
    expected = quadratic.loss + quadratic.rises(np.array(steps)).reshape(4, 4)
    # Sums of some hundred terms of about the size of their result, each rounded to 1e-16.
    np.testing.assert_allclose(result.losses, expected, rtol=1e-12)
    assert result.errors.shape == (4, 4) and np.isnan(result.errors).all()


def test_losses_and_errors_are_those_of_a_plain_loop(data):
    model = eager(of_convolutions())
    model.compile("sgd", from_logits(), metrics=["accuracy"], run_eagerly=True)
    result = loss_surface(model, *data, num_points=2, span=(-1, 2), seed=0)
    trained = [numpy(v).copy() for v in model.trainable_variables]
    first, second = (parts(d, model) for d in result.directions)
    for i, a in enumerate((-1, 2)):
        for j, b in enumerate((-1, 2)):
            for v, w, d, e in zip(model.trainable_variables, trained, first, second):
                v.assign(w + a * d + b * e)
            loss, accuracy = model.evaluate(*data, verbose=0)
            # Float32, through three layers.
            assert result.losses[i, j] == pytest.approx(loss, rel=1e-4)
            assert result.errors[i, j] == pytest.approx(1 - accuracy, abs=1e-6)
    assert np.ptp(result.losses) > 0.1 and np.ptp(result.errors) > 0


def test_line_is_the_middle_row_of_the_plane(data):
    model = linear()
    plane = loss_surface(model, *data, num_points=3, seed=0)
    line = loss_surface(model, *data, directions=1, num_points=3, seed=0)
    np.testing.assert_array_equal(line.losses, plane.losses[:, 1])
    np.testing.assert_array_equal(line.directions[0], plane.directions[0])
    assert line.names == ("random direction 1",) and line.normalize == "filter"


def test_chunks_and_batches_do_not_change_the_result(float64, data):
    x, y = data
    settings = {"directions": 1, "num_points": 3, "seed": 0}
    expected = loss_surface(linear(), x, y, **settings).losses
    keras.utils.set_random_seed(0)
    model = linear()
    first = loss_surface(model, x, y, **settings).losses
    np.testing.assert_allclose(loss_surface(model, x, y, chunk_size=5, **settings).losses, first)
    np.testing.assert_allclose(loss_surface(model, in_batches(x, y), **settings).losses, first)
    assert not np.allclose(loss_surface(model, x, y, num_examples=6, **settings).losses, expected)


def test_seed_determines_the_directions_and_is_returned(data):
    model, settings = linear(), {"directions": 1, "num_points": 2}
    drawn = [loss_surface(model, *data, **settings) for _ in range(2)]
    again = loss_surface(model, *data, seed=drawn[0].seed, **settings)
    np.testing.assert_array_equal(drawn[0].losses, again.losses)
    assert drawn[0].seed != drawn[1].seed
    assert not np.allclose(drawn[0].directions, drawn[1].directions)


# ---------------------------------------------------------------- random directions


def scaled_by_filters(weights, draws, filters):
    """Scale draws to the norms of filters, one after the other; `filters` gives their slices."""
    expected = np.zeros_like(draws)
    for index in filters:
        ratio = np.sqrt(np.sum(weights[index] ** 2)) / np.sqrt(np.sum(draws[index] ** 2))
        expected[index] = ratio * draws[index]
    return expected


def outputs(shape):
    return [(..., k) for k in range(shape[-1])]


def pairs(shape):
    return [(slice(None), slice(None), i, k) for i in range(shape[2]) for k in range(shape[3])]


def nothing(shape):
    return []


def attention(inputs):
    return layers.MultiHeadAttention(2, 3, attention_axes=1)(inputs, inputs)


@pytest.mark.parametrize(
    ("make", "shape", "filters"),
    [
        (lambda: layers.Dense(4), (6,), [outputs, nothing]),
        (lambda: layers.Conv2D(3, 2), (3, 4, 2), [outputs, nothing]),
        (lambda: layers.DepthwiseConv2D(2, depth_multiplier=3), (3, 4, 2), [pairs, nothing]),
        (lambda: layers.SeparableConv2D(3, 2, depth_multiplier=2), (3, 4, 2),
         [pairs, outputs, nothing]),
        (lambda: layers.Conv2DTranspose(3, 2), (3, 4, 2),
         [lambda shape: [(..., k, slice(None)) for k in range(3)], nothing]),
        (lambda: layers.Embedding(7, 3), (4,), [lambda shape: range(7), ]),
        (lambda: layers.GRU(3), (4, 2), [outputs, outputs, nothing]),
        (lambda: attention, (4, 5), 3 * [
            lambda shape: [(slice(None), h, k) for h in range(2) for k in range(3)], nothing,
        ] + [outputs, nothing]),
        (lambda: layers.BatchNormalization(), (3, 4, 2), [nothing, nothing]),
        (lambda: layers.LayerNormalization(axis=(1, 2)), (3, 4), [nothing, nothing]),
    ],
    ids=["Dense", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose", "Embedding",
         "GRU", "MultiHeadAttention", "BatchNormalization", "LayerNormalization"],
)  # fmt: skip
def test_each_filter_of_a_direction_has_the_norm_of_that_of_the_weights(rng, make, shape, filters):
    inputs = keras.Input(shape)
    last = layers.Dense(NUM_CLASSES, use_bias=False)(layers.Flatten()(make()(inputs)))
    model = eager(compiled(keras.Model(inputs, last), from_logits()))
    for variable in model.trainable_variables:  # so that no bias is zero
        variable.assign(rng.uniform(0.5, 2, variable.shape))
    function = LossFunction(model)
    drawn, found = (
        parts(directions_of(1, function, [], how, seed=0)[0][0], model) for how in (None, "filter")
    )
    found, drawn = found[:-1], drawn[:-1]
    assert len(found) == len(filters)
    for variable, draws, direction, slices in zip(model.trainable_variables, drawn, found, filters):
        expected = scaled_by_filters(numpy(variable), draws, slices(variable.shape))
        np.testing.assert_allclose(direction, expected, rtol=1e-5)  # float32 sums of a few terms


def test_other_normalisations(data):
    model = linear()
    drawn, by_layer, by_weight = (
        loss_surface(model, *data, directions=1, num_points=2, normalize=how, seed=0).directions[0]
        for how in (None, "layer", "weight")
    )
    kernel = numpy(model.trainable_variables[0]).ravel()
    assert np.all(drawn[24:] == 0) and np.all(drawn[:24] != 0)  # the bias
    norms = [np.sqrt(np.sum(array**2)) for array in (kernel, drawn)]
    np.testing.assert_allclose(by_layer, drawn * norms[0] / norms[1], rtol=1e-5)
    np.testing.assert_allclose(by_weight[:24], drawn[:24] * np.abs(kernel), rtol=1e-5)
    assert abs(np.mean(drawn[:24])) < 4 / np.sqrt(24)


def rescaled_before_batch_norm(scales):
    """Return a network whose function does not depend on the scales of its filters."""
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization(epsilon=1e-12)
    stack = [layers.Dense(5, use_bias=False), norm, layers.ReLU(), layers.Dense(NUM_CLASSES)]
    model = eager(sequential(*stack))
    model.layers[0].kernel.assign(numpy(model.layers[0].kernel) * scales)
    norm.moving_mean.assign(0.1 * scales)
    norm.moving_variance.assign(scales**2)
    return model


def test_rescaled_filters_have_the_same_surface_if_it_is_normalised_by_filters(float64, data):
    """The kernel and its direction scale alike, and batch normalisation divides by the scale."""
    scales = np.array([0.1, 0.5, 1.0, 3.0, 20.0])
    nets = rescaled_before_batch_norm(np.ones(5)), rescaled_before_batch_norm(scales)
    for how, same in (("filter", True), ("layer", False), (None, False)):
        plain, rescaled = (
            loss_surface(m, *data, directions=1, num_points=3, normalize=how, seed=0).losses
            for m in nets
        )
        # The epsilon of 1e-12 beside a variance of 0.01 at least.
        assert np.allclose(plain, rescaled, rtol=1e-9) == same


# ---------------------------------------------------------------- given directions


def test_gradient_is_a_direction_of_the_norm_1(rng):
    quadratic = Quadratic(rng)
    result = loss_surface(
        quadratic.model, quadratic.x, quadratic.y, directions=["gradient"], num_points=2
    )
    expected = quadratic.slope / np.linalg.norm(quadratic.slope)
    np.testing.assert_allclose(result.directions, expected[None], rtol=1e-4, atol=1e-5)
    assert result.names == ("the gradient",) and result.normalize is None


def test_direction_to_another_model_ends_there(float64, data):
    model, other = linear(), linear()
    result = loss_surface(model, *data, directions=[other, np.ones(28)], span=(0, 1), num_points=2)
    expected = [plain_loss(m, *data) for m in (model, other)]
    np.testing.assert_allclose(result.losses[:, 0], expected, rtol=1e-12)
    assert result.names == ("the line to a model", "given direction 2")


def test_directions_may_be_arrays_like_the_variables(data, rng):
    model = linear()
    arrays = [rng.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
    vector = np.concatenate([a.ravel() for a in arrays])
    one, other = (
        loss_surface(model, *data, directions=[d], num_points=2) for d in (arrays, vector)
    )
    np.testing.assert_array_equal(one.losses, other.losses)
    again = loss_surface(model, *data, directions=one.directions, num_points=2)
    np.testing.assert_array_equal(one.losses, again.losses)


def test_statistics_are_given_anew_at_each_point(float64, data):
    model = rescaled_before_batch_norm(np.ones(5))
    settings = {"directions": 1, "num_points": 2, "seed": 0}
    result = loss_surface(model, *data, reestimate=True, **settings)
    kernel = numpy(model.layers[0].kernel)
    rest = parts(result.directions[0], model)
    last, norm = model.layers[3], model.layers[1]
    before = numpy(last.kernel)
    for a, loss in zip(result.coordinates, result.losses):
        hidden = data[0] @ (kernel + a * rest[0])
        model.layers[0].kernel.assign(kernel + a * rest[0])
        last.kernel.assign(before + a * rest[3])
        norm.moving_mean.assign(hidden.mean(axis=0))
        norm.moving_variance.assign(hidden.var(axis=0))
        assert loss == pytest.approx(plain_loss(model, *data), rel=1e-9)


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("reestimate", [True, False])
def test_model_and_seeds_are_untouched(reestimate):
    assert_untouched(
        lambda *args: loss_surface(
            *args, directions=1, num_points=2, reestimate=reestimate, num_examples=10
        )
    )


def test_progress_counts_the_points(data, capsys):
    loss_surface(linear(), *data, num_points=2, verbose=1)
    assert "4/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"span": 0}, "`span` must be a finite number greater than 0. Received: span=0"),
        ({"span": (1, 0)}, "`span` must be a number greater than 0, or two finite numbers"),
        ({"span": (0, np.inf)}, "`span` must be a number greater than 0, or two finite numbers"),
        ({"num_points": 1}, "`num_points` must be an integer of at least 2. Received: num_points="),
        ({"normalize": "filters"}, "`normalize` must be one of 'filter', 'layer', 'weight'."),
        ({"reestimate": 1}, "`reestimate` must be `True` or `False`."),
        ({"directions": 3}, "`directions` must be an integer from 1 to 2. Received: directions=3"),
        ({"directions": "gradient"}, "`directions` must be 1, 2 or a sequence of one or two"),
        ({"directions": [np.ones(28)] * 3}, "`directions` must be 1, 2 or a sequence of one or"),
        ({"directions": ["slope"]}, "`direction` must be one of 'gradient'. Received: direction="),
        ({"directions": [np.ones(27)]}, "Received: (27,), where there are 28 trainable weights"),
        ({"directions": [[np.ones((6, 4))]]}, "A direction must be an array of as many numbers"),
        ({"directions": [np.zeros(28)]}, "Received: given direction 1, of norm 0."),
        ({"directions": [np.full(28, np.nan)]}, "must be finite, and move some weight. Received:"),
        ({"num_examples": 13}, "`num_examples` must not exceed the number of examples in the data"),
        ({"y": None}, "Labels are needed. Received: y=None."),
    ],
)  # fmt: skip
def test_bad_arguments(data, arguments, message):
    arguments = {"x": data[0], "y": data[1], **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_surface(linear(), **arguments)


# ---------------------------------------------------------------- pictures


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


@pytest.fixture
def plane(data):
    return loss_surface(linear(), *data, num_points=4, seed=7)


def test_contours_lie_as_the_coordinates_do(pyplot, plane):
    """The first direction is the horizontal one: contours of a are vertical lines."""
    losses = np.tile(plane.coordinates[:, None], 4) + 2
    axes = plot.loss_surface(dataclasses.replace(plane, losses=losses))
    assert axes.get_xlabel().endswith("random direction 1")
    assert axes.get_ylabel().endswith("random direction 2")
    assert axes.get_title() == "a slice of the loss, filter-normalised, seed 7"
    for path in axes.collections[-1].get_paths():
        x, y = path.vertices.T
        if len(x):
            assert np.ptp(y) > 1.9 and np.ptp(x) < 1e-6
    own = pyplot.figure().add_subplot()
    assert plot.loss_surface(plane, own) is own


@pytest.mark.parametrize("factor", [1, 1000])
def test_levels_are_logarithmic_where_losses_range_widely(pyplot, plane, factor):
    losses = np.linspace(1, 2 * factor, 16).reshape(4, 4)
    losses[1, 2] = np.inf
    axes = plot.loss_surface(dataclasses.replace(plane, losses=losses))
    levels = axes.collections[-1].levels
    steps = np.diff(np.log(levels) if factor > 1 else levels)
    np.testing.assert_allclose(steps, steps[0])
    axes.figure.canvas.draw()


def test_surface_needs_axes_of_three_dimensions(pyplot, plane):
    axes = plot.loss_surface(plane, kind="surface")
    assert axes.name == "3d" and axes.get_zlabel() == "mean loss"
    wide = dataclasses.replace(plane, losses=10.0 ** np.arange(16).reshape(4, 4))
    assert plot.loss_surface(wide, axes, kind="surface").get_zlabel() == "mean loss, log10"
    with pytest.raises(ValueError, match=re.escape("add_subplot(projection='3d')")):
        plot.loss_surface(plane, pyplot.figure().add_subplot(), kind="surface")
    with pytest.raises(ValueError, match="`axes` must have two dimensions here"):
        plot.loss_surface(plane, axes)


def test_line_is_drawn_with_its_errors(pyplot, data):
    result = loss_surface(linear(), *data, directions=1, num_points=3)
    axes = plot.loss_surface(result)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), result.losses)
    right = axes.figure.axes[1]
    np.testing.assert_array_equal(right.lines[0].get_ydata(), result.errors)
    wide = dataclasses.replace(result, losses=np.array([1, 10, 100.0]))
    assert plot.loss_surface(wide).get_yscale() == "log"


def test_pictures_refuse_other_things(plane):
    with pytest.raises(TypeError, match="`result` must be a `LossSurface`"):
        plot.loss_surface(1)
    with pytest.raises(ValueError, match="`kind` must be one of 'contour', 'surface'"):
        plot.loss_surface(plane, kind="3d")
