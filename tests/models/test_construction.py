"""Every way to make a `RegularizedModel`, in one process and in any order."""

import keras
import numpy as np
import pytest
from frameworks import assert_allclose, assert_array_equal
from keras import layers
from keras.src.models.functional import Functional
from parameters import slow_but, with_slow
from ways_to_make import (
    SINGLE,
    X2,
    Y2,
    X,
    Y,
    as_dict,
    as_list,
    graph,
    graph_of_several,
    make_functional_subclass,
    make_subclass,
    make_subclass_of_several,
    make_subclass_that_passes_on_arguments,
    sequential,
    trained_weights,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.models.regularized_training import RegularizedTraining
from keras_infomcr.regularizers import SubBatchPerturbation


@pytest.fixture(scope="module")
def expected_single():
    keras.utils.set_random_seed(0)
    weights = trained_weights(RegularizedModel(*graph()))
    plain = trained_weights(RegularizedModel(*graph()), beta=0.0)
    assert max(abs(a - b).max() for a, b in zip(weights, plain)) > 1e-3  # it is regularised
    return weights


@pytest.mark.parametrize(
    "way",
    with_slow(
        SINGLE,
        "functional, outputs keyword",
        "functional, keywords",
        "subclass, build",
        "subclass, training argument",
        "functional subclass, positional",
        "functional subclass, mixin",
        "from Sequential",
        "from subclass, training argument",
    ),
)
def test_every_way_trains_alike(way, expected_single):
    model = SINGLE[way]()
    assert isinstance(model, RegularizedModel)
    assert isinstance(model, keras.Model)
    for weight, expected in zip(trained_weights(model), expected_single, strict=True):
        assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("way", slow_but(["subclass", "from deferred Sequential"], "subclass"))
def test_an_unbuilt_model_is_built_by_fit(way, eager):
    model = SINGLE[way]()
    regularizer = SubBatchPerturbation(num_sub_batches=2)
    model.compile("sgd", "mse", run_eagerly=eager, regularizer=regularizer)
    history = model.fit(X, Y, verbose=0)
    assert np.isfinite(history.history["infomcr_reg"]).all()
    assert len(model.trainable_variables) == 4
    assert model(X).shape == (8, 2)


# Several inputs and outputs

SEVERAL = {
    "functional": lambda s: RegularizedModel(*graph_of_several(s)),
    "subclass": lambda s: make_subclass_of_several(RegularizedModel, s)(),
    "from Functional": lambda s: RegularizedModel.from_model(keras.Model(*graph_of_several(s))),
    "from subclass": lambda s: RegularizedModel.from_model(
        make_subclass_of_several(keras.Model, s)()
    ),
}


@pytest.fixture(scope="module")
def expected_several():
    keras.utils.set_random_seed(0)
    model = RegularizedModel(*graph())
    return trained_weights(model, loss=lambda y, p: keras.ops.mean((y - p) ** 2, axis=-1) * 5)


@pytest.mark.parametrize("structure", slow_but([as_dict, as_list], as_dict))
@pytest.mark.parametrize("way", SEVERAL)
def test_several_inputs_and_outputs_train_alike(way, structure, expected_several):
    model = SEVERAL[way](structure)
    # (y - p)^2 + (2y - 2p)^2 = 5 (y - p)^2
    weights = trained_weights(
        model, structure(X2), structure(Y2), loss=structure(dict(once="mse", twice="mse"))
    )
    for weight, expected in zip(weights, expected_several, strict=True):
        assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    shapes = keras.tree.map_structure(np.shape, model(structure(X2)))
    assert shapes == structure({"once": (8, 2), "twice": (8, 2)})


@pytest.mark.parametrize("way", ["subclass, training argument", "from subclass"])
def test_calls_take_positional_and_keyword_arguments(way):
    model = SINGLE[way]()
    name = "x" if way.startswith("subclass") else "inputs"
    positional = model(X, training=False)
    assert_array_equal(positional, model(**{name: X}, training=False))


# Several models in one process

STYLES = {
    "functional": lambda: RegularizedModel(*graph()),
    "subclass": lambda: make_subclass()(),
    "functional subclass": lambda: make_functional_subclass()(),
    "from_model": lambda: RegularizedModel.from_model(make_subclass(keras.Model)()),
}


@pytest.mark.parametrize("second", STYLES)
@pytest.mark.parametrize("first", STYLES)
def test_ways_do_not_disturb_each_other(first, second):
    for style in (first, second):
        assert STYLES[style]()(X).shape == (8, 2)
        assert RegularizedModel.__bases__ == (RegularizedTraining, keras.Model)


def test_grandchildren_of_both_kinds():
    class Base(RegularizedModel):
        pass

    class Graph(Base):
        def __init__(self):
            super().__init__(*graph())

    class Grandchild(Graph):
        pass

    Other = make_subclass()
    for _ in range(2):
        for cls in (Grandchild, Graph, Other):
            model = cls()
            assert type(model) is cls
            assert isinstance(model, RegularizedModel)
            assert model(X).shape == (8, 2)


@pytest.mark.parametrize("functional_first", [False, True])
def test_a_common_base_of_both_kinds(functional_first):
    class Base(RegularizedModel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.tag = "common"

    kinds = [make_functional_subclass(Base), make_subclass(Base)]
    for cls in (kinds if functional_first else kinds[::-1]) * 2:
        model = cls()
        assert model.tag == "common"
        assert isinstance(model, Base)
        assert model(X).shape == (8, 2)
    assert Base.__bases__ == (RegularizedModel,)


def test_one_class_may_be_made_both_with_and_without_a_graph():
    Net = make_subclass_that_passes_on_arguments()
    assert isinstance(Net(*graph()), Functional)
    assert isinstance(Net(*graph(), name="again"), Functional)


# What the model is


def test_a_functional_model_is_functional():
    model = RegularizedModel(*graph(), name="mine", trainable=False)
    assert isinstance(model, Functional)
    assert model.name == "mine"
    assert not model.trainable_variables
    plain = keras.Model(*graph())
    assert [type(x) for x in model.layers] == [type(x) for x in plain.layers]
    assert model.input_shape == plain.input_shape
    assert model.output_shape == plain.output_shape
    assert model.get_layer(index=1) is model.layers[1]
    assert isinstance(keras.Model(model.inputs, model.layers[1].output), keras.Model)


def test_layers_of_a_subclass():
    model = make_subclass()()
    assert model.layers == [model.hidden, model.out]


@pytest.mark.parametrize(
    "way", ["functional", "subclass", "functional subclass", "from Sequential", "from subclass"]
)
def test_summary(way):
    model, lines = SINGLE[way](), []
    model(X)
    model.summary(print_fn=lines.append)
    assert model.name in lines[0]
    assert "Total params: 23" in "\n".join(lines)


def test_as_a_layer_of_a_plain_model():
    inner = RegularizedModel(*graph())
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, inner(inputs))
    outer.compile("sgd", "mse", run_eagerly=True)
    before = inner.get_weights()
    history = outer.fit(X, Y, verbose=0).history
    assert not np.array_equal(before[0], inner.get_weights()[0])
    assert set(history) == {"loss"}


# What is no model


@pytest.mark.parametrize(
    "make",
    [
        lambda: RegularizedModel(sequential()),
        lambda: RegularizedModel([layers.Dense(2)]),
        lambda: RegularizedModel((layers.Dense(2),)),
        lambda: RegularizedModel(layers.Dense(2)),
        lambda: RegularizedModel([keras.Input((4,)), layers.Dense(2)]),
    ],
    ids=["model", "layers", "tuple", "layer", "with input"],
)
def test_what_is_for_from_model_is_sent_there(make):
    message = (
        r"is made of inputs and outputs\. Received: .* Call `RegularizedModel\.from_model\(model\)`"
    )
    with pytest.raises(TypeError, match=message):
        make()


def test_a_list_of_inputs_may_stand_alone_where_outputs_are_named():
    inputs = [keras.Input((2,)), keras.Input((2,))]
    outputs = layers.Add()(inputs)
    for given in (inputs, tuple(inputs)):
        assert len(RegularizedModel(given, outputs=outputs).inputs) == 2


@pytest.mark.parametrize("arguments", [{}, {"name": "mine"}])
def test_a_model_without_layers_is_refused(arguments):
    model = RegularizedModel(**arguments)
    with pytest.raises(
        ValueError, match=r"must have layers\. Received: .* as a subclass with `call`"
    ):
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="You must call `compile"):
        model.fit(X, Y)
