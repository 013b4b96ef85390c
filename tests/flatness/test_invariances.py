"""Which measures change where a network is rescaled; the table in docs/flatness.md is made here."""

import functools
import inspect
import pathlib

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy
from keras import layers
from nets import from_logits

from keras_infomcr import flatness

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "flatness.md"
BEGIN, END = "<!-- invariances: begin -->\n", "<!-- invariances: end -->"

# A power of two rescales floating-point numbers without rounding, so that a measure that does not
# depend on the scale comes out the same to the last digit or nearly so, however it is computed. By
# 8 some measures happen to change little: they first rise and then fall with the logits.
FACTOR = 1 / 64


def layer(model):
    """Divide the weights of a ReLU layer, multiply the next layer's kernel."""
    scale(model.get_layer("second").trainable_variables, FACTOR)
    scale([model.get_layer("last").kernel], 1 / FACTOR)


def batch_norm(model):
    """Divide the weights before batch normalisation, and its statistics as training would."""
    norm = model.get_layer("norm")
    scale([*model.get_layer("first").trainable_variables, norm.moving_mean], FACTOR)
    scale([norm.moving_variance], FACTOR**2)


def logits(model):
    """Divide the logits, which leaves the predicted classes as they are, not the loss."""
    scale(model.get_layer("last").trainable_variables, FACTOR)


def scale(variables, factor):
    for variable in variables:
        variable.assign(factor * variable)


RESCALINGS = {"layer": layer, "batch norm": batch_norm, "logits": logits}
TITLES = "layer rescaling", "batch-norm scale", "logit scale"

TRIALS = {"num_examples": 8, "num_trials": 2}
# By the name in the docs, which says in brackets what is set: the settings, and whether the measure
# stays at each rescaling.
MEASURES = {
    "hessian_spectral_radius": ({}, "no no no"),
    "hessian_top_eigenvalues": ({"num_eigenvalues": 2}, "no no no"),
    "hessian_trace": ({"num_products": 6}, "no no no"),
    "hessian_trace_by_layer": ({"num_products": 6}, "no no no"),
    "hessian_frobenius_norm": ({}, "no no no"),
    "hessian_spectral_density": ({"num_steps": 10}, "no no no"),
    "fisher_spectral_radius": (TRIALS, "no no no"),
    "fisher_frobenius_norm": (TRIALS, "no no no"),
    "fisher_trace": (TRIALS, "no no no"),
    "gamma_hat": (TRIALS, "no no no"),
    "gamma_hat (`normalize_softmax=True`)": (TRIALS | {"normalize_softmax": True}, "no no no"),
    "gamma_hat_by_layer": (TRIALS, "no no no"),
    "gamma": (TRIALS, "no no no"),
    "local_entropy": ({"gamma": 10.0, "num_samples": 4}, "no no no"),
    "local_entropy_gradient_norm": ({"num_chains": 2}, "no no no"),
    "local_learning_coefficient": ({"num_chains": 2, "num_steps": 40}, "no no no"),
    "local_energy (`kind=\"additive\"`)": ({"kind": "additive", "num_samples": 4}, "no no no"),
    "local_energy": ({"sigma": 0.3, "num_samples": 4}, "yes yes no"),
    "adaptive_sharpness": ({}, "yes yes no"),
    "average_adaptive_sharpness": ({"num_samples": 4}, "yes yes no"),
    "input_jacobian_norm": ({}, "yes yes no"),
    "relative_flatness": ({"num_products": 6}, "yes yes no"),
    "relative_flatness (a ReLU layer)": ({"layer": "second", "num_products": 6}, "yes yes no"),
    "relative_flatness (before batch norm)": ({"layer": "first", "num_products": 6}, "yes yes no"),
    "fisher_rao_norm": ({}, "yes yes no"),
    "fisher_rao_norm (`labels=\"data\"`)": ({"labels": "data"}, "yes yes no"),
}  # fmt: skip
FAST = "average_adaptive_sharpness", "relative_flatness", "fisher_rao_norm"

pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit the measured examples")


def network():
    """Return a network with a layer of each kind, and data that it fits more or less."""
    rng = np.random.default_rng(0)
    # An epsilon that vanishes beside the variance, so that the variance alone is rescaled.
    stack = [layers.Dense(8, name="first"), layers.BatchNormalization(epsilon=1e-12, name="norm")]
    stack += [layers.ReLU(), layers.Dense(8, "relu", name="second"), layers.Dense(3, name="last")]
    model = keras.Sequential([keras.Input((6,)), *stack])
    model.compile("sgd", from_logits(), run_eagerly=BACKEND != "jax")
    for variable in model.variables:
        positive = "variance" in variable.path or "gamma" in variable.path
        draw = functools.partial(rng.uniform, 0.5, 1.5) if positive else rng.normal
        variable.assign(draw(size=variable.shape))
    x = rng.normal(size=(16, 6)).astype("float32")
    return model, x, numpy(model(x)).argmax(axis=1)


def numbers(name, *args):
    """Return what a measure gives, as an array."""
    settings, _ = MEASURES[name]
    result = getattr(flatness, name.split(" ")[0])(*args, seed=0, **settings)
    found = [getattr(result, a) for a in ("values", "grid", "value") if hasattr(result, a)]
    return np.ravel(found[0])


@pytest.fixture(scope="module")
def unscaled():
    """Return a function that measures the network as it is, once for each measure."""
    known = {}

    def measured(name):
        if name not in known:
            known[name] = numbers(name, *network())
        return known[name]

    return measured


@pytest.mark.parametrize("rescaling", RESCALINGS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in MEASURES]
)
def test_what_a_rescaling_changes(unscaled, name, rescaling):
    """The measures that stay do so to float32's rounding; all others change by a tenth or more."""
    model, x, y = network()
    RESCALINGS[rescaling](model)
    before, after = unscaled(name), numbers(name, model, x, y)
    stays = dict(zip(RESCALINGS, MEASURES[name][1].split()))[rescaling] == "yes"
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert np.isfinite(change)
    assert change < 1e-6 if stays else change > 0.1


@pytest.mark.parametrize("rescaling", RESCALINGS)
def test_a_rescaling_leaves_the_function_or_the_classes(rescaling):
    model, x, y = network()
    before = numpy(model(x))
    RESCALINGS[rescaling](model)
    after = numpy(model(x))
    np.testing.assert_allclose(after, before * (FACTOR if rescaling == "logits" else 1), rtol=1e-6)
    np.testing.assert_array_equal(after.argmax(axis=1), y)


def test_every_measure_of_a_model_has_a_row():
    functions = [getattr(flatness, name) for name in flatness.__all__]
    functions = [f for f in functions if inspect.isfunction(f)]
    of_models = {f.__name__ for f in functions if "model" in inspect.signature(f).parameters}
    no_measures = {"loss_between", "loss_surface", "reestimate_batch_norm"}
    assert of_models - no_measures == {name.split(" ")[0] for name in MEASURES}


def test_the_table_in_the_docs_is_this_one():
    """What stands between the markers is made of what the test above has shown."""
    rows = [("measure", *TITLES), ("---", "---", "---", "---")]
    for name, (_, cells) in MEASURES.items():
        function, _, setting = name.partition(" ")
        rows.append((f"`{function}` {setting}".rstrip(), *cells.split()))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    assert DOCS.read_text().split(BEGIN)[1].split(END)[0] == table
