"""Where no regulariser acts, a `RegularizedModel` is the `keras.Model` that it replaces."""

import functools

import keras
import numpy as np
import pytest
from frameworks import only_on
from literal_reading import assert_same, check_training, trained, variables, weights_of
from small_nets import LABELS, X, Y, classifier, compiling, fitting, normalized, two_layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.slow
def test_evaluate_and_its_like_return_what_keras_returns():
    def run(model):
        model.fit(X, LABELS, verbose=0)
        results = {
            "evaluate": model.evaluate(X, LABELS, verbose=0),
            "train_on_batch": model.train_on_batch(X, LABELS),
            "test_on_batch": model.test_on_batch(X, LABELS),
            **model.evaluate(X, LABELS, verbose=0, return_dict=True),
        }
        assert [len(results[k]) for k in list(results)[:3]] == [2, 2, 2]
        assert model.metrics_names == ["loss", "compile_metrics"]
        assert [m.name for m in model.metrics] == ["loss", "compile_metrics"]
        return {**results, "predict": model.predict(X, verbose=0)}

    compile = compiling(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    check_training(classifier, run, compile, literal=False)


FIT, COMPILE = fitting(epochs=2), compiling(metrics=["mae"])


@functools.cache
def trained_by_keras():
    """Return the variables and the logs of a plain model."""
    plain, logs = trained(keras.Model, normalized, FIT, COMPILE)
    return variables(plain), logs


def test_no_regularizer_is_plain_keras():
    ours, logs = trained(RegularizedModel, normalized, FIT, COMPILE, regularizer=None)
    plain, plain_logs = trained_by_keras()
    assert_same(logs, plain_logs)
    assert_same(variables(ours), plain)
    assert ours.regularizer is None


def test_closed_gate_is_plain_keras_to_the_bit():
    def build(base):
        model = normalized(base)
        model.regularizer_active = False
        return model

    ours, logs = trained(RegularizedModel, build, FIT, COMPILE)
    plain, plain_logs = trained_by_keras()
    assert np.isnan(logs.pop("infomcr_reg")).tolist() == [True, True]
    assert_same(logs, plain_logs)
    assert_same(variables(ours), plain)


@only_on(
    "tensorflow",
    "torch",
    reason="On JAX, Keras trains a model without a loss instead of refusing it.",
)
def test_model_without_a_loss():
    for main in ("full_batch", "auto"):
        model = two_layers(RegularizedModel)
        model.compile("sgd", regularizer=SubBatchPerturbation(main_gradient=main))
        before = weights_of(model)
        with pytest.raises(ValueError, match="No loss to compute"):
            model.fit(X, Y, verbose=0)
        np.testing.assert_array_equal(weights_of(model), before)
