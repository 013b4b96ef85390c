"""Traces of layers, eigenvectors, and searches for eigenvalues that start near earlier ones."""

import keras
import numpy as np
import pytest
from hessian_nets import Net
from keras import layers
from measuring import Quadratic

from keras_infomcr.core.trace import hutch_plus_plus, hutchinson
from keras_infomcr.flatness import (
    GammaHatByLayer,
    Hessian,
    TopEigenvalues,
    hessian_top_eigenvalues,
    hessian_trace,
    hessian_trace_by_layer,
    plot,
)
from keras_infomcr.flatness.loss.loss_function import LossFunction

# Small networks with random weights may be wrong about their few examples, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")


@pytest.fixture(scope="module")
def net():
    return Net("layer_norm", np.random.default_rng(0))


@pytest.fixture
def products(monkeypatch):
    """Return a list whose sum is the number of Hessian-vector products so far."""
    counted, original = [], LossFunction.hessian_vector_products

    def counting(self, data, at, vectors):
        counted.append(len(vectors))
        return original(self, data, at, vectors)

    monkeypatch.setattr(LossFunction, "hessian_vector_products", counting)
    return counted


def blocks_of(net):
    """Return the rows of the Hessian of each layer: a kernel or scale, and a bias, each."""
    ends = np.cumsum(net.sizes)[1::2]
    return np.split(np.arange(sum(net.sizes)), ends[:-1])


def traces_of_blocks(net):
    return np.array([np.trace(net.hessian[np.ix_(rows, rows)]) for rows in blocks_of(net)])


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_traces_of_layers_against_the_hessian_formed(net, method):
    found = net.measured(hessian_trace_by_layer, method=method, num_products=90)
    assert found.layers == tuple(layer.path for layer in net.model.layers if layer.weights)
    assert found.num_weights == tuple(map(len, blocks_of(net)))
    # 4 standard errors of 30 draws: less than one in a thousand for each of three layers.
    assert np.all(np.abs(found.values - traces_of_blocks(net)) <= 4 * found.stderrs)
    assert np.all(found.stderrs < 0.3 * found.values.sum())  # else the test would mean little
    assert found.samples.shape == ({"hutchinson": 90, "hutch++": 30}[method], 3)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_they_sum_to_the_trace_from_the_same_products(net, method, products):
    found = net.measured(hessian_trace_by_layer, method=method)
    assert sum(products) == 30
    expected = net.measured(hessian_trace, method=method)
    assert sum(products) == 60
    # The same products, summed in another order: float32's rounding of some hundred terms.
    assert found.values.sum() == pytest.approx(expected.value, rel=1e-5)
    np.testing.assert_allclose(found.samples.sum(axis=1), expected.samples, rtol=1e-4)


@pytest.mark.slow
def test_trials_are_averaged(net):
    settings = {"num_examples": 6, "num_trials": 4, "num_products": 6}
    found = net.measured(hessian_trace_by_layer, **settings)
    expected = net.measured(hessian_trace, **settings)
    assert found.samples.shape == (4, 3)
    np.testing.assert_allclose(found.samples.sum(axis=1), expected.samples, rtol=1e-4)
    np.testing.assert_allclose(found.stderrs, found.samples.std(axis=0, ddof=1) / 2)


def by_blocks(*slices):
    def dots(vectors, others):
        return np.stack([(vectors[:, s] * others[:, s]).sum(axis=1) for s in slices], axis=1)

    return dots


BLOCKS = by_blocks(slice(0, 3), slice(3, 40))


def test_hutchinson_is_exact_for_diagonal_matrices(rng):
    diagonal = rng.normal(size=40)
    probes = rng.choice([-1.0, 1.0], (2, 40))
    found = hutchinson(lambda v: v * diagonal, [probes], BLOCKS)
    expected = diagonal[:3].sum(), diagonal[3:].sum()
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-12)


def test_hutch_plus_plus_by_blocks_is_exact_for_matrices_of_the_rank_of_the_sketch(rng):
    """Also between blocks, which Hutchinson's estimator of a block is not."""
    rows = rng.normal(size=(3, 40))
    matrix = rows.T @ np.diag([3.0, 1, -2]) @ rows
    sketches, probes = [rng.normal(size=(3, 40))], [rng.choice([-1.0, 1.0], (4, 40))]
    found = hutch_plus_plus(lambda v: v @ matrix, sketches, probes, BLOCKS)
    expected = np.trace(matrix[:3, :3]), np.trace(matrix[3:, 3:])
    np.testing.assert_allclose(found, [expected] * 4, rtol=1e-9, atol=1e-9)


def test_hutch_plus_plus_by_blocks_over_all_probes_is_the_trace_of_the_blocks(rng):
    matrix = rng.normal(size=(6, 6))
    matrix += matrix.T
    probes = np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(6, -1).T
    dots = by_blocks(slice(0, 2), slice(2, 6))
    found = hutch_plus_plus(lambda v: v @ matrix, [rng.normal(size=(2, 6))], [probes], dots)
    expected = np.trace(matrix[:2, :2]), np.trace(matrix[2:, 2:])
    np.testing.assert_allclose(found.mean(axis=0), expected, rtol=1e-10)


@pytest.mark.slow
def test_known_eigenvalues_lower_the_errors_and_shift_nothing(net):
    hessian = Hessian(net.model, net.x, net.y, seed=0)
    known = hessian.top_eigenvalues(num_eigenvalues=10, vectors=True)
    settings = {"num_products": 90, "method": "hutchinson"}
    plain, better = (hessian.trace_by_layer(known=k, **settings) for k in (None, known))
    # Ten eigenvalues hold all but a few per cent of the squares that the variance is made of.
    assert np.all(better.stderrs < 0.5 * plain.stderrs)
    assert np.all(np.abs(better.values - traces_of_blocks(net)) <= 4 * better.stderrs)


def test_eigenvectors_on_request(net):
    found = net.measured(hessian_top_eigenvalues, num_eigenvalues=3, vectors=True)
    assert found.vectors.shape == (3, sum(net.sizes))
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(3), atol=1e-5)
    images = found.vectors @ net.hessian
    residuals = np.linalg.norm(images - found.eigenvalues[:, None] * found.vectors, axis=1)
    # What the tolerance bounds, and the error of the products.
    assert np.all(residuals <= (0.01 + 1e-3) * np.abs(found.eigenvalues))
    assert net.measured(hessian_top_eigenvalues, num_eigenvalues=3).vectors is None


def test_vectors_of_a_hessian_that_has_moved_halve_the_products(net, products):
    hessian = Hessian(net.model, net.x, net.y, seed=0)
    settings = {"num_eigenvalues": 2, "vectors": True}
    first = hessian.top_eigenvalues(**settings)
    cold = sum(products)
    before = net.model.get_weights()
    net.model.set_weights([w + 1e-3 for w in before])
    products.clear()
    again = hessian.top_eigenvalues(starts=first.vectors, **settings)
    warm = sum(products)
    exact = hessian.top_eigenvalues(tolerance=1e-4, **settings)
    net.model.set_weights(before)
    assert warm <= 0.75 * cold
    np.testing.assert_allclose(again.eigenvalues, exact.eigenvalues, rtol=0.01)


def test_an_eigenvalue_that_has_overtaken_is_found():
    """The start is an eigenvector exactly, whose products would never leave it."""
    model = keras.Sequential([keras.Input((20,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    x, y = np.diag(np.sqrt(np.r_[100.0, 1, np.full(18, 0.01)])).astype("float32"), np.zeros((20, 1))
    hessian = Hessian(model, x, y, seed=0)
    second = np.eye(20)[1:2]
    found = hessian.top_eigenvalues(num_eigenvalues=1, starts=second)
    # 2/20 x^T x, and a product leaves room for the error of 1 % alone.
    assert found.value == pytest.approx(10, rel=0.01)


def test_gradient_is_the_slope_of_the_loss(rng):
    quadratic = Quadratic(rng)
    hessian = Hessian(quadratic.model, quadratic.x, quadratic.y)
    np.testing.assert_allclose(hessian.gradient(), quadratic.slope, rtol=1e-4, atol=1e-5)
    trials = Hessian(quadratic.model, quadratic.x, quadratic.y, num_examples=3, num_trials=4)
    np.testing.assert_allclose(trials.gradient(), quadratic.slope, rtol=1e-4, atol=1e-5)


def test_bad_arguments(net):
    hessian = Hessian(net.model, net.x, net.y, num_examples=12, num_trials=2)
    with pytest.raises(ValueError, match=r"`vectors=True` needs a single .* num_trials=2\. Use"):
        hessian.top_eigenvalues(vectors=True)
    with pytest.raises(ValueError, match="`vectors` must be `True` or `False`"):
        hessian.top_eigenvalues(vectors=3)
    for starts in (np.ones(hessian.size), np.ones((2, 3)), np.full((1, hessian.size), np.nan)):
        with pytest.raises(ValueError, match="`starts` must be finite vectors"):
            hessian.top_eigenvalues(starts=starts)
    with pytest.raises(ValueError, match=r"`known` must be the result of `top_eigenvalues\(vec"):
        hessian.trace_by_layer(known=TopEigenvalues(1.0, 1.0, np.ones((1, 1)), np.ones(1)))
    with pytest.raises(ValueError, match="`num_products` must be an integer of at least 6"):
        net.measured(hessian_trace_by_layer, num_products=5)
    with pytest.raises(ValueError, match="`method` must be one of"):
        net.measured(hessian_trace_by_layer, method="hutch")


def test_bars_of_layers_are_drawn(net):
    found = net.measured(hessian_trace_by_layer)
    axes = plot.by_layer(found)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(found.values))
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found.layers)
    assert axes.get_xlabel() == "trace of the Hessian by the layer's weights"
    nothing = np.zeros(3)
    gammas = GammaHatByLayer(found.layers, found.num_weights, nothing, nothing)
    assert plot.by_layer(gammas).get_xlabel() == "gamma-hat of the layer"
    with pytest.raises(TypeError, match=r"`gamma_hat_by_layer.* or `hessian_trace_by_layer"):
        plot.by_layer(3.0)
