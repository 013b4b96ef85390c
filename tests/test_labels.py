"""Labels of sparse cross-entropies: one check, one message, on all backends."""

import re

import keras
import numpy as np
import pytest
from frameworks import array, only_on
from keras import layers, losses

from keras_infomcr import RegularizedModel, flatness
from keras_infomcr.labels import check_labels
from keras_infomcr.regularizers import SubBatchPerturbation

SPARSE = losses.SparseCategoricalCrossentropy
BAD = {
    "large": [0, 1, 2, 3, 4, 0],
    "negative": [0, 1, 2, 3, -1, 0],
    "huge": [0, 1, 2, 3, 2**40, 0],
    "column": [[0], [1], [2], [3], [4], [0]],
    "floats": [0.0, 1.0, 2.0, 3.0, 4.0, 0.0],
}
SAMPLING = {"num_examples": 6, "num_trials": 1}
MEASURES = {
    "hessian_trace": {},
    "hessian_frobenius_norm": {},
    "hessian_spectral_radius": {},
    "hessian_top_eigenvalues": {},
    "hessian_spectral_density": {},
    "local_energy": {},
    "local_entropy": {},
    "local_entropy_gradient_norm": {},
    "local_learning_coefficient": {},
    "adaptive_sharpness": {},
    "gamma_hat": SAMPLING,
    "gamma_hat_by_layer": SAMPLING,
    "gamma": SAMPLING,
    "fisher_trace": SAMPLING,
}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x):
        return self.dense(x)


def functional(loss=None, base=keras.Model):
    inputs = keras.Input((3,))
    model = base(inputs, layers.Dense(4)(inputs))
    settings = {} if base is keras.Model else {"regularizer": SubBatchPerturbation(0.1, 1.0, 2)}
    model.compile("sgd", loss or SPARSE(from_logits=True), **settings)
    return model


def subclassed(loss=None):
    model = Subclassed()
    model(np.zeros((1, 3)))
    model.compile("sgd", loss or SPARSE(from_logits=True))
    return model


def inputs_of(rng):
    return rng.normal(size=(6, 3)).astype("float32")


def message(y, rest=""):
    y = np.asarray(y)
    return re.escape(
        f"`y` must hold integers from 0 to 3{rest} for a sparse categorical cross-entropy of 4 "
        f"classes. Received: y of shape {y.shape} and dtype {y.dtype}, from {y.min()} to {y.max()}"
    )


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("make", [functional, subclassed])
def test_measures_refuse_labels_that_stand_for_no_class(rng, make, name):
    y = np.array(BAD["negative"])
    with pytest.raises(ValueError, match=message(y)):
        getattr(flatness, name)(make(), inputs_of(rng), y, **MEASURES[name])


def test_labels_of_a_subclassed_model_that_stand_for_classes(rng):
    x, y, model = inputs_of(rng), np.array([0, 1, 2, 3, 3, 0]), subclassed()
    plain = functional()
    plain.set_weights(model.get_weights())
    settings = {"chunk_size": 4, "sigma": 0.1, "num_samples": 2, "seed": 0}
    expected, found = (flatness.local_energy(m, x, y, **settings).value for m in (plain, model))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", BAD)
def test_fit_refuses_labels_that_stand_for_no_class(rng, labels):
    model, y = functional(base=RegularizedModel), np.array(BAD[labels])
    before = model.get_weights()
    for data in (y, array(y.astype("int32" if y.max() < 2**31 else "float32"))):
        with pytest.raises(ValueError, match="`y` must hold integers from 0 to 3 for a sparse"):
            model.fit(inputs_of(rng), data, verbose=0)
    for weight, value in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, value)


def test_labels_that_are_not_numbers_are_refused_in_fit(rng):
    y = np.array([0, 1, 2, np.nan, 0, 1])
    with pytest.raises(ValueError, match=r"Received: y of shape .* from nan to nan"):
        functional(base=RegularizedModel).fit(inputs_of(rng), y, verbose=0)


@pytest.mark.parametrize("ignored", [-1, pytest.param(255, marks=pytest.mark.slow)])
def test_ignored_class_is_allowed_and_no_other(rng, ignored):
    loss = SPARSE(from_logits=True, ignore_class=ignored)
    model, x = functional(loss, RegularizedModel), inputs_of(rng)
    y = np.array([0, 1, 2, 3, ignored, ignored])
    model.fit(x, y, verbose=0)
    assert np.isfinite(flatness.hessian_trace(model, x, y, num_products=6).value)
    text = message([-2, 1, 2, 3, 0, 0], f", or {ignored}, the `ignore_class` of the loss,")
    for measure in (lambda *a: model.fit(*a, verbose=0), lambda *a: check_labels(model, *a[1:])):
        with pytest.raises(ValueError, match=text):
            measure(x, np.array([-2, 1, 2, 3, 0, 0]))


@only_on("jax", reason="On TensorFlow and torch, plain Keras refuses such labels.")
def test_examples_of_no_weight_may_have_any_label(rng):
    model, y = functional(base=RegularizedModel), np.array([0, 1, 2, 3, 3, -1])
    model.fit(inputs_of(rng), y, sample_weight=(y >= 0).astype("float32"), verbose=0)


def test_one_score_is_no_row_of_classes():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, "softmax")])
    model.compile("sgd", SPARSE())
    text = r"at least 2 class scores an example. Received: outputs of shape \(None, 1\)"
    with pytest.raises(ValueError, match=text):
        check_labels(model, np.array([0, 1]))


def test_labels_of_other_losses_are_no_classes():
    check_labels(functional("mse"), np.full((6, 4), -1.0))


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", SPARSE()])
@pytest.mark.parametrize("kind", ["list", "dict", "names", "one loss"])
def test_each_output_has_classes_of_its_own(kind, loss):
    inputs = keras.Input((3,))
    b, a = (layers.Dense(n, "softmax", name=name)(inputs) for n, name in ((2, "b"), (5, "a")))
    outputs = {"b": b, "a": a} if kind == "dict" else [b, a]
    model = keras.Model(inputs, outputs)
    losses_of = {"list": [loss, loss], "one loss": loss}.get(kind, {"a": loss, "b": loss})
    model.compile("sgd", losses_of)
    low, high = np.array([0, 1]), np.array([0, 4])
    right = {"b": low, "a": high} if kind == "dict" else [low, high]
    wrong = {"b": high, "a": low} if kind == "dict" else [high, low]
    check_labels(model, right)
    with pytest.raises(ValueError, match=r"integers from 0 to 1 for .* of 2 classes"):
        check_labels(model, wrong)


def test_what_is_no_array_is_left_to_keras():
    """Batches, and labels that there are too few or too many of."""
    model = functional()
    for y in (None, [0, 1, 9], [np.array([9]), np.array([9])], {"c": iter([9])}):
        check_labels(model, y)
    check_labels(subclassed(), np.array([9]))  # whose classes are not known


class CountsFromOne(RegularizedModel):
    """Changes the labels in its `compute_loss`."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y - 1, y_pred, sample_weight, training)


def test_labels_that_the_model_changes_are_its_own_business(rng):
    model = functional(base=CountsFromOne)
    x, y = inputs_of(rng), np.array([1, 2, 3, 4, 4, 1])
    model.fit(x, y, verbose=0)
    assert np.isfinite(flatness.hessian_trace(model, x, y).value)


def test_a_loss_for_one_output_by_name_is_that_of_no_other(rng):
    inputs = keras.Input((3,))
    outputs = {"a": layers.Dense(4, name="a")(inputs), "b": layers.Dense(1, name="b")(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": SPARSE(from_logits=True)})
    check_labels(model, {"a": np.array([0, 1, 3]), "b": np.array([-9.7, 0.0, 13.8])})
    with pytest.raises(ValueError, match="from 0 to 4"):
        check_labels(model, {"a": np.array([0, 1, 4]), "b": np.array([-9.7, 0.0, 13.8])})


def test_labels_of_outputs_of_unknown_size():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(1)(inputs)[..., 0])
    model.compile("sgd", SPARSE(from_logits=True))
    check_labels(model, np.array([0, 7]))
    with pytest.raises(ValueError, match=r"integers from 0 to K - 1 .* from -1 to 7"):
        check_labels(model, np.array([-1, 7]))


def test_labels_of_masked_outputs_may_be_anything():
    inputs = keras.Input((None,))
    outputs = layers.Dense(4)(layers.Embedding(5, 3, mask_zero=True)(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", SPARSE(from_logits=True))
    check_labels(model, np.array([[0, 3, -1], [1, -1, -1]]))


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize("keys", [("b", "a"), ("a", "b"), ("a",)], ids=" ".join)
def test_losses_by_the_names_of_entries_in_any_order(rng, keys):
    """The keys name entries of the outputs, which are not the names of the layers."""
    inputs = keras.Input((4,))
    outputs = {"b": layers.Dense(2, name="bb")(inputs), "a": layers.Dense(3, name="aa")(inputs)}
    model = RegularizedModel(inputs, outputs)
    known = {"a": losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    regularizer = SubBatchPerturbation(num_sub_batches=2)
    chosen = {key: known[key] for key in keys}
    model.compile("sgd", chosen, run_eagerly=True, regularizer=regularizer)
    x = rng.normal(size=(6, 4))
    y = {"a": np.array([0, 1, 2, 0, 1, 2]), "b": rng.normal(size=(6, 2))}
    model.fit(x, y, verbose=0)
    y["a"][0] = 3
    with pytest.raises(ValueError, match="`y` must hold integers from 0 to 2"):
        model.fit(x, y, verbose=0)
