"""Configurations, JSON and clones of regularised models."""

import keras
import numpy as np
import pytest
from frameworks import assert_array_equal
from ways_to_make import (
    ORIGINALS,
    SINGLE,
    X2,
    X,
    Y,
    as_dict,
    compile_small,
    graph,
    graph_of_several,
    make_functional_subclass,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.models.regularized_model import RegularizedFunctional
from keras_infomcr.regularizers import SubBatchPerturbation


def assert_same_architecture(a, b):
    assert [type(x) for x in a.layers] == [type(x) for x in b.layers]
    assert [w.shape for w in a.weights] == [w.shape for w in b.weights]
    b.set_weights(a.get_weights())
    assert_array_equal(a(X), b(X))


def is_copy(a, b):
    return not {id(w) for w in a.weights} & {id(w) for w in b.weights}


@pytest.mark.parametrize("revive", [RegularizedModel, RegularizedFunctional])
def test_config_round_trip(revive):
    model = RegularizedModel(*graph(), name="mine")
    copy = revive.from_config(model.get_config())
    assert type(copy) is type(model)
    assert copy.name == "mine"
    assert is_copy(model, copy)
    assert_same_architecture(model, copy)


def test_config_round_trip_of_dict_inputs():
    model = RegularizedModel(*graph_of_several(as_dict))
    copy = RegularizedModel.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    for name, output in model(X2).items():
        assert_array_equal(output, copy(X2)[name])


def test_a_config_is_readable_by_plain_keras():
    model = RegularizedModel(*graph())
    plain = keras.Model.from_config(model.get_config())
    assert not isinstance(plain, RegularizedModel)
    assert_same_architecture(model, plain)
    assert_same_architecture(plain, RegularizedModel.from_config(plain.get_config()))


@pytest.mark.parametrize(
    "original", ["Functional", "Sequential", "subclass", "deferred Sequential", "graph"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_json_round_trip(original, compiled):
    model = RegularizedModel(*graph())
    if original != "graph":
        cls = ORIGINALS[original]
        model = RegularizedModel.from_model(cls())
    model(X)
    if compiled:
        model.compile("sgd", "mse", regularizer=SubBatchPerturbation(0.5, 3.0, 2))
    objects = {"Net": ORIGINALS["subclass"]} if original == "subclass" else {}
    copy = keras.models.model_from_json(model.to_json(), custom_objects=objects)
    assert type(copy) is type(model)
    assert_same_architecture(model, copy)
    if compiled:
        assert copy.regularizer.get_config() == model.regularizer.get_config()


CLONABLE = {
    "functional": lambda: RegularizedModel(*graph(), name="mine"),
    "from Functional": SINGLE["from Functional"],
    "from Sequential": SINGLE["from Sequential"],
    "functional subclass, *args": SINGLE["functional subclass, *args"],
}


@pytest.mark.parametrize("regularizer", ["set", None])
@pytest.mark.parametrize("way", CLONABLE)
def test_clone_of_a_compiled_model(way, regularizer):
    model = CLONABLE[way]()
    if regularizer:
        regularizer = SubBatchPerturbation(0.5, 3.0, 2, "full_batch")
    sgd = keras.optimizers.SGD(0.1, 0.9)
    model.compile(sgd, "mse", metrics=["mae"], run_eagerly=True, regularizer=regularizer)
    model.regularizer_active = False
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert clone.name == model.name
    assert is_copy(model, clone)
    assert_same_architecture(model, clone)
    assert clone.optimizer.get_config() == model.optimizer.get_config()
    assert clone.optimizer is not model.optimizer
    assert not clone.regularizer_active
    if regularizer is None:
        assert clone.regularizer is None
    else:
        assert clone.regularizer is not regularizer
        assert clone.regularizer.get_config() == regularizer.get_config()
        clone.regularizer_active = True
    assert clone.run_eagerly
    clone.train_on_batch(X, Y)
    assert not np.array_equal(model.get_weights()[0], clone.get_weights()[0])


@pytest.mark.parametrize("way", CLONABLE)
def test_clone_of_an_uncompiled_model(way):
    model = CLONABLE[way]()
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert not clone.compiled
    assert_same_architecture(model, clone)


@pytest.mark.parametrize("compiled", [False, True])
def test_clone_of_a_functional_subclass_with_a_signature_of_its_own(compiled):
    model = make_functional_subclass()()
    if compiled:
        compile_small(model)
    clone = keras.models.clone_model(model)  # Keras makes a plain Functional
    assert_same_architecture(model, clone)
    assert clone.compiled == compiled
    if compiled:
        clone.train_on_batch(X, Y)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["subclass", "deferred Sequential"])
def test_clone_of_a_wrapped_model(kind, compiled):
    model = RegularizedModel.from_model(ORIGINALS[kind]())
    model(X)
    if compiled:
        model.compile("sgd", "mse", regularizer=SubBatchPerturbation(0.5, 3.0, 2))
    with keras.saving.custom_object_scope({"Net": ORIGINALS["subclass"]}):
        clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert is_copy(model, clone)
    assert_same_architecture(model, clone)
    if compiled:
        assert clone.regularizer.get_config() == model.regularizer.get_config()


def test_clone_with_a_clone_function():
    def widen(layer):
        config = layer.get_config()
        if config["units"] == 3:
            config["units"] = 5
        return type(layer).from_config(config)

    model = RegularizedModel(*graph())
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    clone = keras.models.clone_model(model, clone_function=widen)
    assert isinstance(clone, RegularizedModel)
    assert clone.count_params() == 37
    assert clone.regularizer.num_sub_batches == 2
