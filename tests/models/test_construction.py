"""Every way to make a `RegularizedModel`, in one process and in any order."""

import keras
import numpy as np
import pytest
from frameworks import assert_allclose, assert_array_equal, numpy, only_on
from keras import layers
from keras.src.models.functional import Functional

from keras_infomcr import RegularizedModel
from keras_infomcr.models.regularized_model import RegularizedFunctional
from keras_infomcr.models.regularized_training import RegularizedTraining
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 2)).astype("float32")


def graph(name=None):
    """Return inputs and outputs of a net of five layers."""
    inputs = keras.Input((4,), name=name)
    outputs = layers.Dense(2)(layers.Dense(3, activation="tanh")(inputs))
    return inputs, outputs


def two_dense(model):
    model.hidden = layers.Dense(3, activation="tanh")
    model.out = layers.Dense(2)


def make_subclass(base=RegularizedModel):
    class Net(base):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            two_dense(self)

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    return Net


def make_subclass_with_training(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            super().__init__()
            two_dense(self)

        def call(self, x, training=None):
            return self.out(self.hidden(x, training=training), training=training)

    return Net


def make_subclass_with_arguments(base=RegularizedModel):
    class Net(base):
        def __init__(self, hidden, units):  # two positional arguments, as inputs and outputs
            super().__init__(name="net")
            self.hidden = layers.Dense(hidden, activation="tanh")
            self.out = layers.Dense(units)

        def call(self, inputs, training=False, mask=None):
            return self.out(self.hidden(inputs))

    return Net


def make_subclass_without_init(base=RegularizedModel):
    class Net(base):
        def build(self, input_shape):
            two_dense(self)
            self.hidden.build(input_shape)
            self.out.build((None, 3))
            self.built = True

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    return Net


def make_functional_subclass(base=RegularizedModel):
    class Net(base):
        def __init__(self, units=2):
            inputs = keras.Input((4,))
            outputs = layers.Dense(units)(layers.Dense(3, activation="tanh")(inputs))
            super().__init__(inputs=inputs, outputs=outputs, name="net")

    return Net


def make_functional_subclass_positional(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            super().__init__(*graph())
            self.units = 2

    return Net


def make_functional_subclass_with_call(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            self.was_called = False
            super().__init__(*graph(), name="net")

        def call(self, inputs, training=None, mask=None):
            self.was_called = True
            return super().call(inputs, training=training, mask=mask)

    return Net


def make_subclass_that_passes_on_arguments(base=RegularizedModel):
    class Net(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    return Net


def make_subclass_with_mixin(base=RegularizedModel):
    class Mixin:
        def greet(self):
            return "hello"

    class Net(Mixin, base):
        def __init__(self):
            super().__init__(*graph())

    return Net


def sequential(built=True):
    first = [keras.Input((4,))] if built else []
    return keras.Sequential([*first, layers.Dense(3, activation="tanh"), layers.Dense(2)])


SINGLE = {
    "functional": lambda: RegularizedModel(*graph()),
    "functional, keywords": lambda: RegularizedModel(inputs=(g := graph())[0], outputs=g[1]),
    "functional, outputs keyword": lambda: RegularizedModel((g := graph())[0], outputs=g[1]),
    "subclass": lambda: make_subclass()(),
    "subclass, training argument": lambda: make_subclass_with_training()(),
    "subclass, arguments": lambda: make_subclass_with_arguments()(3, 2),
    "subclass, build": lambda: make_subclass_without_init()(),
    "functional subclass": lambda: make_functional_subclass()(),
    "functional subclass, positional": lambda: make_functional_subclass_positional()(),
    "functional subclass, call": lambda: make_functional_subclass_with_call()(),
    "functional subclass, *args": lambda: make_subclass_that_passes_on_arguments()(*graph()),
    "functional subclass, mixin": lambda: make_subclass_with_mixin()(),
    "from Functional": lambda: RegularizedModel.from_model(keras.Model(*graph())),
    "from Sequential": lambda: RegularizedModel.from_model(sequential()),
    "from deferred Sequential": lambda: RegularizedModel.from_model(sequential(built=False)),
    "from subclass": lambda: RegularizedModel.from_model(make_subclass(keras.Model)()),
    "from subclass, training argument": lambda: RegularizedModel.from_model(
        make_subclass_with_training(keras.Model)()
    ),
    "from functional subclass": lambda: RegularizedModel.from_model(
        make_functional_subclass(keras.Model)()
    ),
}


def weights_like(model):
    rng = np.random.default_rng(3)
    return [0.5 * rng.normal(size=w.shape) for w in model.get_weights()]


def compile_small(model, loss="mse", regularizer="set", **kwargs):
    """Compile for two sub-batches, eagerly: for a few tiny steps faster than tracing."""
    if regularizer == "set":
        regularizer = SubBatchPerturbation(
            alpha=0.1, num_sub_batches=2, main_gradient="full_batch", **kwargs
        )
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True, regularizer=regularizer)


def trained_weights(model, x=X, y=Y, loss="mse", **kwargs):
    """Return the weights after two regularised steps from weights that are always the same."""
    if not model.built:
        model(x)
    model.set_weights(weights_like(model))
    compile_small(model, loss, **kwargs)
    for _ in range(2):
        model.train_on_batch(x, y)
    return model.get_weights()


@pytest.fixture(scope="module")
def expected_single():
    keras.utils.set_random_seed(0)
    weights = trained_weights(RegularizedModel(*graph()))
    plain = trained_weights(RegularizedModel(*graph()), beta=0.0)
    assert max(abs(a - b).max() for a, b in zip(weights, plain)) > 1e-3  # it is regularised
    return weights


@pytest.fixture(autouse=True)
def bases_stay():
    yield
    assert RegularizedModel.__bases__ == (RegularizedTraining, keras.Model)
    assert RegularizedFunctional.__bases__ == (RegularizedModel, Functional)
    assert not issubclass(RegularizedModel, Functional)


@pytest.mark.parametrize("way", SINGLE)
def test_every_way_trains_alike(way, expected_single):
    model = SINGLE[way]()
    assert isinstance(model, RegularizedModel)
    assert isinstance(model, keras.Model)
    for weight, expected in zip(trained_weights(model), expected_single, strict=True):
        assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("way", ["subclass", "from deferred Sequential"])
def test_an_unbuilt_model_is_built_by_fit(way, eager):
    model = SINGLE[way]()
    regularizer = SubBatchPerturbation(num_sub_batches=2)
    model.compile("sgd", "mse", run_eagerly=eager, regularizer=regularizer)
    history = model.fit(X, Y, verbose=0)
    assert np.isfinite(history.history["infomcr_reg"]).all()
    assert len(model.trainable_variables) == 4
    assert model(X).shape == (8, 2)


# Several inputs and outputs: the same net, its input cut in two, its output sent out twice.

X2 = {"left": X[:, :2], "right": X[:, 2:]}
Y2 = {"once": Y, "twice": 2 * Y}


def graph_of_several(structure):
    inputs = {"left": keras.Input((2,), name="left"), "right": keras.Input((2,), name="right")}
    hidden = layers.Dense(3, activation="tanh")(layers.Concatenate()(list(inputs.values())))
    outputs = {"once": layers.Dense(2, name="once")(hidden)}
    outputs["twice"] = layers.Rescaling(2.0, name="twice")(outputs["once"])
    return structure(inputs), structure(outputs)


def make_subclass_of_several(base, structure):
    class Net(base):
        def __init__(self):
            super().__init__()
            two_dense(self)

        def call(self, inputs, training=None):
            left, right = inputs.values() if isinstance(inputs, dict) else inputs
            once = self.out(self.hidden(keras.ops.concatenate([left, right], axis=-1)))
            return structure({"once": once, "twice": 2.0 * once})

    return Net


def as_dict(x):
    return dict(x)


def as_list(x):
    return list(x.values())


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


@pytest.mark.parametrize("structure", [as_dict, as_list])
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


# from_model

ORIGINALS = {
    "Functional": lambda: keras.Model(*graph(), name="original"),
    "Sequential": sequential,
    "deferred Sequential": lambda: sequential(built=False),
    "subclass": make_subclass(keras.Model),
    "subclass, training argument": make_subclass_with_training(keras.Model),
    "functional subclass": make_functional_subclass(keras.Model),
    "functional subclass, call": make_functional_subclass_with_call(keras.Model),
}


@pytest.mark.parametrize("built_first", [False, True])
@pytest.mark.parametrize("kind", ORIGINALS)
def test_from_model_shares_the_weights(kind, built_first):
    original = ORIGINALS[kind]()
    if built_first:
        original(X)
    model = RegularizedModel.from_model(original)
    assert model.name == original.name
    assert not model.compiled
    compile_small(model)
    model(X)
    assert all(a is b for a, b in zip(model.weights, original.weights, strict=True))
    before = original.get_weights()
    model.train_on_batch(X, Y)
    for a, b, c in zip(before, original.get_weights(), model.get_weights(), strict=True):
        assert not np.array_equal(a, b)
        assert_array_equal(b, c)
    assert_array_equal(original(X, training=False), model(X, training=False))


@pytest.mark.parametrize("kind", ["Functional", "Sequential", "subclass", "functional subclass"])
def test_from_model_leaves_a_compiled_original_alone(kind):
    original = ORIGINALS[kind]()
    original.compile("adam", "mae", metrics=["mae"], run_eagerly=True)
    original.train_on_batch(X, Y)
    optimizer = original.optimizer
    model = RegularizedModel.from_model(original)
    compile_small(model)
    model.train_on_batch(X, Y)
    assert original.optimizer is optimizer
    assert original.loss == "mae"
    assert int(optimizer.iterations) == int(model.optimizer.iterations) == 1
    assert len(original.train_on_batch(X, Y)) == 2
    assert int(optimizer.iterations) == 2


def test_from_model_uses_the_overridden_call():
    original = make_functional_subclass_with_call(keras.Model)()
    original.was_called = False
    RegularizedModel.from_model(original)(X)
    assert original.was_called


def test_from_model_of_a_regularized_model_is_itself():
    model = RegularizedModel(*graph())
    assert RegularizedModel.from_model(model) is model


def test_from_model_of_sequential_with_dict_inputs():
    class Join(layers.Layer):
        def call(self, inputs):
            return keras.ops.concatenate([inputs["left"], inputs["right"]], axis=-1)

    original = keras.Sequential([Join(), layers.Dense(2)])
    original(X2)
    assert original.built
    model = RegularizedModel.from_model(original)
    compile_small(model)
    model.train_on_batch(X2, Y)
    assert all(a is b for a, b in zip(model.weights, original.weights, strict=True))


def test_from_model_of_sequential_with_dict_outputs():
    class Split(layers.Layer):
        def call(self, inputs):
            return {"left": inputs[:, :1], "right": inputs[:, 1:]}

    model = RegularizedModel.from_model(keras.Sequential([keras.Input((4,)), Split()]))
    assert {name: output.shape for name, output in model(X).items()} == {
        "left": (8, 1),
        "right": (8, 3),
    }


def test_a_wrapped_deferred_sequential_builds():
    original = sequential(built=False)
    model = RegularizedModel.from_model(original)
    model.build((None, 4))
    assert model.built
    assert [w.shape for w in model.weights] == [(4, 3), (3,), (3, 2), (2,)]
    assert all(a is b for a, b in zip(model.weights, original.weights, strict=True))


def test_wrapped_model_keeps_the_dtype_of_inputs(float64):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    original = make_subclass(keras.Model)(dtype="float64")
    for layer in original.layers:
        layer.dtype_policy = "float64"
    x = np.random.default_rng(4).normal(size=(8, 4))
    outputs = RegularizedModel.from_model(original)(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
    assert_array_equal(original(x), outputs)


@only_on("tensorflow", "torch", reason="Keras cannot update metrics in `call` on JAX")
def test_wrapped_model_keeps_its_own_metrics():
    class Measured(make_subclass(keras.Model)):
        def __init__(self):
            super().__init__()
            self.mean_output = keras.metrics.Mean(name="mean_output")

        def call(self, inputs):
            outputs = super().call(inputs)
            self.mean_output.update_state(outputs)
            return outputs

    logs = []
    for wrap in (lambda m: m, RegularizedModel.from_model):
        keras.utils.set_random_seed(0)
        model = wrap(Measured())
        kwargs = {"regularizer": None} if isinstance(model, RegularizedModel) else {}
        model.compile("sgd", "mse", run_eagerly=True, **kwargs)
        history = model.fit(X, Y, epochs=2, verbose=0).history
        logs.append((history, model.evaluate(X, Y, verbose=0, return_dict=True)))
    assert "mean_output" in logs[0][0]
    assert logs[0] == logs[1]


class Noisy(keras.Model):
    """A net whose layers differ between training and inference, with or without saying so."""

    def __init__(self):
        super().__init__()
        self.noise = layers.Dropout(0.5, seed=1)
        self.normalization = layers.BatchNormalization()
        self.out = layers.Dense(2)

    def call(self, inputs):
        return self.out(self.normalization(self.noise(inputs)))


class NoisyWithTraining(Noisy):
    def call(self, inputs, training=None):
        return self.out(
            self.normalization(self.noise(inputs, training=training), training=training)
        )


class NoisyByDefault(Noisy):
    def call(self, inputs, training=True):
        return self.out(self.normalization(self.noise(inputs), training=training))


@pytest.mark.parametrize("cls", [Noisy, NoisyWithTraining, NoisyByDefault])
def test_wrapped_model_trains_as_the_original_does(cls):
    results = []
    for wrap in (lambda m: m, RegularizedModel.from_model):
        keras.utils.set_random_seed(0)
        model = wrap(cls())
        kwargs = {"regularizer": None} if isinstance(model, RegularizedModel) else {}
        model.compile("sgd", "mse", run_eagerly=True, **kwargs)
        losses = [model.train_on_batch(X, Y) for _ in range(3)]
        outputs = [model(X), model(X, training=False), model.predict_on_batch(X)]
        results.append([*model.get_weights(), losses, *map(numpy, outputs)])
    for plain, wrapped in zip(*results, strict=True):
        assert_array_equal(plain, wrapped)


@pytest.mark.parametrize("model", [None, "model", layers.Dense(2), RegularizedModel])
def test_from_model_of_no_model(model):
    with pytest.raises(TypeError, match=r"`model` must be a `keras\.Model`\. Received: model="):
        RegularizedModel.from_model(model)


METHODS = [
    *("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics"),
    *("fit", "evaluate", "predict", "compile", "reset_metrics", "get_metrics_result"),
    *("train_on_batch", "test_on_batch", "predict_on_batch", "stateless_compute_loss"),
    *("make_train_function", "make_test_function", "make_predict_function"),
]
PROPERTIES = ["metrics", "losses", "trainable_variables", "non_trainable_variables"]


@pytest.mark.parametrize("name", [*METHODS, *PROPERTIES])
@pytest.mark.parametrize("make", [make_subclass, make_functional_subclass])
def test_from_model_of_a_model_with_a_step_of_its_own(name, make):
    override = getattr(keras.Model, name)
    own = property(lambda self: override.fget(self))
    if name in METHODS:
        own = lambda self, *a, **k: override(self, *a, **k)  # noqa: E731
    cls = type("Own", (make(keras.Model),), {name: own})
    message = rf"must not override `{name}`, which .*Received: model=.*from `RegularizedModel` inst"
    with pytest.raises(ValueError, match=message):
        RegularizedModel.from_model(cls())


@pytest.mark.parametrize("make", [make_subclass(keras.Model), lambda: keras.Model(*graph())])
def test_from_model_of_a_model_whose_instance_has_a_step_of_its_own(make):
    model = make()
    model.compute_loss = lambda *args, **kwargs: 0.0
    with pytest.raises(ValueError, match=r"must not override `compute_loss`, which"):
        RegularizedModel.from_model(model)


@pytest.mark.parametrize("kind", ["Functional", "subclass", "functional subclass"])
def test_from_model_of_a_model_that_has_been_used(kind):
    """What Keras sets on a model in use is nothing that a user overrides."""
    original = ORIGINALS[kind]()
    original.compile("sgd", "mse", metrics=["mae"])
    original.fit(X, Y, validation_data=(X, Y), verbose=0)
    original.predict(X, verbose=0)
    original.evaluate(X, Y, verbose=0)
    RegularizedModel.from_model(original)


class Task(keras.Model):
    """Preprocesses in `fit` and `predict`, as the tasks of KerasHub do."""

    def __init__(self):
        super().__init__(*graph())
        self.preprocessor = layers.Rescaling(0.5)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        return keras.utils.pack_x_y_sample_weight(self.preprocessor(x), y, sample_weight)

    def fit(self, x, y, **kwargs):
        return super().fit(*self.preprocess_samples(x, y), **kwargs)

    def predict(self, x, **kwargs):
        return super().predict(self.preprocess_samples(x), **kwargs)


def test_from_model_of_a_task_of_keras_hub_says_what_to_do():
    task = Task()
    message = (
        r"must not override `fit`, `predict`, .* Call `RegularizedModel\(model\.input, model\.out"
    )
    with pytest.raises(ValueError, match=message):
        RegularizedModel.from_model(task)
    model = RegularizedModel(task.input, task.output)
    compile_small(model)
    x, y = task.preprocess_samples(X, Y)
    before = task.get_weights()
    model.fit(x, y, verbose=0)
    assert not np.array_equal(before[0], task.get_weights()[0])
    # The same program on the same numbers; frameworks may add in another order.
    np.testing.assert_allclose(
        task.predict(X, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


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


# Configurations


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
