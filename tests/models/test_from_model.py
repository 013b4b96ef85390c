"""`RegularizedModel.from_model` of every kind of Keras model."""

import keras
import numpy as np
import pytest
from frameworks import assert_array_equal, numpy, only_on
from keras import layers
from parameters import with_slow
from ways_to_make import (
    ORIGINALS,
    X2,
    X,
    Y,
    compile_small,
    graph,
    make_functional_subclass,
    make_functional_subclass_with_call,
    make_subclass,
    sequential,
)

from keras_infomcr import RegularizedModel


@pytest.mark.parametrize("built_first", [False, True])
@pytest.mark.parametrize(
    "kind",
    with_slow(
        ORIGINALS,
        "deferred Sequential",
        "subclass, training argument",
        "functional subclass, call",
    ),
)
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


@only_on("tensorflow", "torch", reason="On JAX, Keras cannot update metrics in `call`.")
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
    """A net whose layers act differently in training, although its `call` has no `training`."""

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


@pytest.mark.parametrize(
    "kind", with_slow(["Functional", "subclass", "functional subclass"], "Functional")
)
def test_from_model_of_a_model_that_has_been_used(kind):
    """Keras sets attributes on a model in use, which must not count as overridden by its user."""
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
    # Both run the same operations on the same numbers; sums may be taken in another order.
    np.testing.assert_allclose(
        task.predict(X, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
