"""Arguments of `SubBatchPerturbation` and of `compile`, and what is saved of them."""

import json

import keras
import numpy as np
import pytest
from gelu_networks import gelu_network

from keras_infomcr import regularizers
from keras_infomcr.regularizers import SubBatchPerturbation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"alpha": v}, "`alpha` must be a finite number greater than 0. Received: alpha=")
          for v in (0, -1e-4, float("nan"), float("inf"), "1e-4", True, None)),
        *(({"beta": v}, "`beta` must be a finite number, 0 or greater. Received: beta=")
          for v in (-1, float("nan"), float("inf"), "10", None)),
        *(({"num_sub_batches": v}, "`num_sub_batches` must be an integer of at least 1. Received: ")
          for v in (0, -2, 2.5, "8", True, None)),
        *(({"main_gradient": v},
           "`main_gradient` must be one of 'auto', 'full_batch', 'sub_batches'. Received: ")
          for v in ("full", None)),
        *(({"estimator": v},
           "`estimator` must be one of 'finite_difference', 'hessian_vector_product'. Received: ")
          for v in ("hessian", None)),
    ],
    ids=str,
)  # fmt: skip
def test_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubBatchPerturbation(**arguments)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_live_beta_out_of_range_keeps_the_old_one(value):
    regularizer = SubBatchPerturbation(beta=3.0)
    with pytest.raises(ValueError, match=r"must be a finite number, 0 or greater\. Received: .*="):
        regularizer.beta = value
    assert float(regularizer.beta) == 3.0


def test_unknown_argument():
    with pytest.raises(TypeError, match="num_perturbations"):
        SubBatchPerturbation(num_perturbations=2)


@pytest.mark.parametrize(
    "value", ["bogus", 3, keras.regularizers.L2()], ids=lambda v: type(v).__name__
)
def test_compile_refuses_what_is_no_regularizer(value):
    model = gelu_network()
    message = r"`regularizer` must be a `Regularizer` instance, `None` or one of .*Received: regu"
    with pytest.raises(ValueError, match=message):
        model.compile("sgd", "mse", regularizer=value)
    assert not model.compiled


# Serialisation

CONFIG = {
    "alpha": 0.3,
    "beta": 0.1,
    "num_sub_batches": 5,
    "main_gradient": "full_batch",
    "num_perturbed": 3,
    "estimator": "hessian_vector_product",
}


def test_defaults_are_those_of_the_paper():
    assert SubBatchPerturbation().get_config() == {
        "alpha": 1e-4,
        "beta": 10.0,
        "num_sub_batches": 8,
        "main_gradient": "auto",
        "num_perturbed": None,
        "estimator": "finite_difference",
    }


def test_config_makes_an_equal_regularizer():
    config = SubBatchPerturbation(**CONFIG).get_config()
    assert config == CONFIG
    assert SubBatchPerturbation.from_config(config).get_config() == CONFIG


def test_config_holds_the_live_beta():
    regularizer = SubBatchPerturbation(**CONFIG)
    regularizer.beta = 0.7
    assert regularizer.get_config() == {**CONFIG, "beta": 0.7}
    assert float(regularizer.strength.numpy()) == pytest.approx(0.7, rel=1e-7)  # float32 on JAX


@pytest.mark.parametrize("number", [float, np.float64, np.float32, np.float16])
def test_serialised_form_is_json(number):
    regularizer = SubBatchPerturbation(number(0.5), number(2), np.int64(4))
    serialised = json.loads(json.dumps(keras.saving.serialize_keras_object(regularizer)))
    assert serialised["registered_name"] == "keras_infomcr>SubBatchPerturbation"
    loaded = keras.saving.deserialize_keras_object(serialised)
    assert isinstance(loaded, SubBatchPerturbation)
    assert loaded.get_config() == regularizer.get_config()


def test_get():
    regularizer = SubBatchPerturbation(**CONFIG)
    assert regularizers.get(regularizer) is regularizer
    assert regularizers.get(None) is None
    by_name = regularizers.get("sub_batch_perturbation")
    assert by_name.get_config() == SubBatchPerturbation().get_config()
    serialised = keras.saving.serialize_keras_object(regularizer)
    assert regularizers.get(serialised).get_config() == CONFIG


@pytest.mark.parametrize("value", ["bogus", 3, SubBatchPerturbation, [SubBatchPerturbation()]])
def test_get_of_something_else(value):
    with pytest.raises(ValueError, match="Received: regularizer="):
        regularizers.get(value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"alpha": 1e-4},
        keras.saving.serialize_keras_object(keras.regularizers.L2()),
    ],
    ids=["empty", "arguments alone", "of a weight penalty"],
)
def test_get_of_a_dictionary_that_is_no_regularizer(value):
    with pytest.raises(ValueError, match=r"or one of \['entropy_sgd', .*\]\. Received: reg"):
        regularizers.get(value)


def test_the_class_in_place_of_an_instance():
    message = r"Pass an instance of the class, `SubBatchPerturbation\(\.\.\.\)`"
    with pytest.raises(ValueError, match=message):
        gelu_network().compile("sgd", "mse", regularizer=SubBatchPerturbation)


def test_repr_shows_the_arguments():
    shown = repr(SubBatchPerturbation(**CONFIG))
    assert eval(shown).get_config() == CONFIG
    regularizer = SubBatchPerturbation()
    regularizer.beta = 20.0
    assert repr(regularizer).startswith("SubBatchPerturbation(alpha=0.0001, beta=20.0, num_sub")


def test_left_out_is_the_default_regularizer():
    model = gelu_network()
    model.compile("sgd", "mse")
    assert model.regularizer.get_config() == SubBatchPerturbation().get_config()
