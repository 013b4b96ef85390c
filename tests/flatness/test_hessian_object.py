"""`Hessian`, the object: its products, and that its methods are the functions of their names."""

import inspect

import keras
import numpy as np
import pytest
from hessian_nets import Net

from keras_infomcr import flatness
from keras_infomcr.flatness import Hessian

# Small networks with random weights may be wrong about their few examples, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")


@pytest.fixture(scope="module")
def net():
    return Net("layer_norm", np.random.default_rng(0))


def test_product_is_in_the_order_of_the_weights(net):
    hessian = Hessian(net.model, net.x, net.y, chunk_size=7)
    assert hessian.size == len(net.hessian)
    for unit in np.eye(hessian.size)[[0, 21, -1]]:  # of a kernel, a bias and the last bias
        found, expected = hessian.product(unit), net.hessian @ unit
        # As docs/flatness.md says of products.
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def test_product_over_trials_is_the_mean_of_theirs(net):
    """Four trials of six share none of the 24 examples: their mean is the Hessian of all."""
    vector = np.arange(Hessian(net.model, net.x, net.y).size) / 10
    whole = Hessian(net.model, net.x, net.y).product(vector)
    mean = Hessian(net.model, net.x, net.y, num_examples=6, num_trials=4).product(vector)
    # float32's rounding of sums in another order.
    np.testing.assert_allclose(mean, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_a_product_that_is_zero_is_no_reason_for_a_warning(net):
    hessian = Hessian(net.model, net.x, net.y)
    np.testing.assert_array_equal(hessian.product(np.zeros(hessian.size)), 0)


def test_product_sees_the_weights_as_they_are(net):
    hessian = Hessian(net.model, net.x, net.y, seed=0)
    ones = np.ones(hessian.size)
    before, trace = hessian.product(ones), hessian.trace(num_products=6).value
    weights = net.model.get_weights()
    net.model.set_weights([0.5 * w for w in weights])
    assert not np.allclose(hessian.product(ones), before, rtol=1e-2)
    assert hessian.trace(num_products=6).value != pytest.approx(trace, rel=1e-2)
    net.model.set_weights(weights)
    np.testing.assert_array_equal(hessian.product(ones), before)
    net.model.layers[0].trainable = False
    assert hessian.size == len(ones) - weights[0].size - weights[1].size
    net.model.layers[0].trainable = True


# Arguments that are results of earlier calls, which an object alone has.
RESULTS = {"known", "starts"}

METHODS = {
    "trace": {"num_products": 6, "method": "hutchinson"},
    "trace_by_layer": {"num_products": 6, "method": "hutchinson"},
    "frobenius_norm": {"num_products": 6},
    "spectral_radius": {"tolerance": 0.1, "max_products": 50},
    "top_eigenvalues": {"num_eigenvalues": 2, "tolerance": 0.1, "max_products": 50},
    "spectral_density": {"num_probes": 2, "num_steps": 4, "width": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_methods_are_the_functions_in_any_order(net, training):
    """With a seed each call draws the same, whatever was called before."""
    settings = {"num_examples": 8, "num_trials": 2, "chunk_size": 5, "seed": 3}
    settings["training"] = training
    hessian = Hessian(net.model, net.x, net.y, **settings)
    found = {name: getattr(hessian, name)(**METHODS[name]) for name in [*METHODS, *METHODS]}
    for name, arguments in METHODS.items():
        function = getattr(flatness, f"hessian_{name}")
        expected = function(net.model, net.x, net.y, **arguments, **settings)
        assert type(found[name]) is type(expected)
        for attribute, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found[name], attribute), value)


def test_defaults_of_methods_and_functions_are_the_same():
    of_object = inspect.signature(Hessian).parameters
    for name in METHODS:
        function = inspect.signature(getattr(flatness, f"hessian_{name}")).parameters
        method = inspect.signature(getattr(Hessian, name)).parameters
        defaults = {n: p.default for n, p in {**of_object, **method}.items() if n != "self"}
        defaults = {n: default for n, default in defaults.items() if n not in RESULTS}
        assert {n: p.default for n, p in function.items()} == defaults


def test_scalar_results_are_numbers(net):
    hessian = Hessian(net.model, net.x, net.y, seed=0)
    for name in ("trace", "frobenius_norm", "spectral_radius", "top_eigenvalues"):
        result = getattr(hessian, name)()
        assert isinstance(result, flatness.Estimate)
        assert float(result) == result.value


def test_a_mistyped_argument_is_named_by_the_function_called(net):
    for name in METHODS:
        with pytest.raises(TypeError, match=rf"hessian_{name}\(\) got an unexpected .*'num_trial'"):
            getattr(flatness, f"hessian_{name}")(net.model, net.x, net.y, num_trial=3)


@pytest.mark.parametrize("vector", [np.ones(3), np.ones((1, 47)), 1.0])
def test_vectors_of_another_shape_are_refused(net, vector):
    hessian = Hessian(net.model, net.x, net.y)
    with pytest.raises(ValueError, match=r"`vector` must have an entry for each trainable weight"):
        hessian.product(vector)


def test_bad_models_and_settings_are_refused_at_once(net):
    with pytest.raises(ValueError, match="`chunk_size` must be an integer of at least 1"):
        Hessian(net.model, net.x, net.y, chunk_size=0)
    with pytest.raises(TypeError, match="`model` must be"):
        Hessian(keras.layers.Dense(3), net.x, net.y)
    with pytest.raises(ValueError, match="Labels are needed"):
        Hessian(net.model, net.x)
