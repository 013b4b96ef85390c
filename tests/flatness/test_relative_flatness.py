"""Relative flatness against the Hessian that NumPy forms, read literally."""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy
from hessian_nets import Net
from keras import layers
from measuring import assert_untouched
from nets import classifier, compiled, misfits, sequential

from keras_infomcr.flatness import relative_flatness

# A layer's number, and its kernel's among the weights.
FIRST, LAST = (0, 0), (-1, 4)


def literal(net, kernel):
    """Return the double sum over the neurons of a layer, of the dense Hessian."""
    start = sum(net.sizes[:kernel])
    block = slice(start, start + net.sizes[kernel])
    matrix = net.weights[kernel].reshape(-1, net.weights[kernel].shape[-1])
    hessian = net.hessian[block, block].reshape(*matrix.shape, *matrix.shape)
    neurons = range(matrix.shape[1])
    return sum(
        matrix[:, s] @ matrix[:, t] * np.trace(hessian[:, s, :, t])
        for s in neurons
        for t in neurons
    )


def measured(net, layer, **settings):
    net.model.run_eagerly = BACKEND != "jax"
    # A third of them span the Z of each layer, at most 32 numbers, so that the trace is exact.
    return net.measured(relative_flatness, layer=layer, **{"num_products": 100} | settings)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("dense_batch_norm", FIRST),
        pytest.param("dense_batch_norm", LAST, marks=pytest.mark.slow),
        *(pytest.param("conv_batch_norm", p, marks=pytest.mark.slow) for p in (FIRST, LAST)),
    ],
)
def test_the_double_sum_over_neurons(rng, name, place):
    net, (layer, kernel) = Net(name, rng), place
    result = measured(net, net.model.layers[layer].name)
    # Of float32, as for the products of the Hessian.
    assert result.value == pytest.approx(literal(net, kernel), rel=1e-3)
    assert result.stderr < 1e-5 * abs(result.value)


def test_the_last_layer_is_the_default_and_a_path_names_one(rng):
    net = Net("dense_batch_norm", rng)
    by_default, by_path = (
        measured(net, name, num_products=6).value for name in (None, net.model.layers[-1].path)
    )
    assert by_default == by_path


@pytest.mark.slow
def test_few_products_are_an_unbiased_estimate(rng):
    net = Net("conv_batch_norm", rng)
    # The kernel has 32 entries, of which six products see two exactly.
    results = [
        relative_flatness(net.model, net.x, net.y, layer=net.model.layers[0].name, num_products=6,
                          seed=seed)
        for seed in range(30)
    ]  # fmt: skip
    values = np.array([r.value for r in results])
    stderr = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - literal(net, 0)) < 4 * stderr
    assert stderr > 0


@misfits
def test_softmax_regression_has_a_closed_form(rng):
    """Without hidden layers H_{s,s'} = E[(p_s [s = s'] - p_s p_s') x x^T], whatever the label."""
    model = sequential(layers.Dense(2))
    model.run_eagerly = BACKEND != "jax"
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, 2, 20)
    kernel, bias = (numpy(v).astype("float64") for v in model.variables)
    p = np.exp(x @ kernel + bias)
    p /= p.sum(axis=1, keepdims=True)
    curvature = np.einsum("ns,st->nst", p, np.eye(2)) - np.einsum("ns,nt->nst", p, p)
    expected = np.einsum("n,nst,st->", np.sum(x**2, axis=1), curvature, kernel.T @ kernel) / 20
    # Rounding of float32, of sums of 20 examples.
    assert relative_flatness(model, x, y, num_products=39, chunk_size=7, seed=0).value == (
        pytest.approx(expected, rel=1e-5)
    )


@pytest.mark.slow
def test_trials(rng):
    net = Net("dense_batch_norm", rng)
    result = measured(net, None, num_examples=12, num_trials=2, num_products=39)
    assert len(result.samples) == 2
    assert result.value == pytest.approx(literal(net, 4), rel=1e-3)


def test_the_model_is_left_as_it_was():
    assert_untouched(lambda *args: relative_flatness(*args, num_products=6, seed=0))


def test_layers_that_are_refused(rng):
    x, y = rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, 4, 12)
    text = "`layer` must be the name or path of one .* Received: layer='{}', and a model"
    with pytest.raises(ValueError, match=text.format("no such")):
        relative_flatness(classifier(), x, y, layer="no such")
    stack = [layers.Reshape((3, 2)), layers.DepthwiseConv1D(2, name="depthwise")]
    stack += [layers.Conv1D(2, 2, groups=2, name="grouped"), layers.Flatten(), layers.Dense(4)]
    for name in ("depthwise", "grouped"):
        with pytest.raises(ValueError, match=text.format(name)):
            relative_flatness(sequential(*stack), x, y, layer=name)
    model = classifier()
    model.layers[-1].trainable = False
    with pytest.raises(ValueError, match=text.format(model.layers[-1].name)):
        relative_flatness(compiled(model), x, y, layer=model.layers[-1].name)
    # Without the frozen one the first layer is the last.
    frozen, first = (
        relative_flatness(model, x, y, layer=name, num_products=6, seed=0)
        for name in (None, model.layers[0].name)
    )
    assert frozen.value == first.value


def test_two_layers_of_one_name_need_a_path(rng):
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="twin")], name="inner")
    model = sequential(inner, layers.Dense(4, name="twin"))
    x, y = rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, 4, 12)
    with pytest.raises(ValueError, match=re.escape("have the paths ['inner/twin', ")):
        relative_flatness(model, x, y, layer="twin")
    assert relative_flatness(model, x, y, layer="inner/twin", num_products=6).value != 0


def test_bad_arguments(rng):
    x, y = rng.normal(size=(12, 6)), rng.integers(0, 4, 12)
    with pytest.raises(ValueError, match="`num_products` must be an integer of at least 6"):
        relative_flatness(classifier(), x, y, num_products=5)
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`\. Received: model='m'"):
        relative_flatness("m", x, y)
