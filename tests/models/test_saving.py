"""Files: whole models, weights, copies; what comes back, and that training goes on."""

import copy
import json
import pickle
import zipfile

import keras
import numpy as np
import pytest
from frameworks import assert_allclose, assert_array_equal, only_on
from keras import layers

from keras_infomcr import RegularizedModel
from keras_infomcr.layers import LogitNormalization
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 2)).astype("float32")

register = keras.saving.register_keras_serializable("tests")


def net(units=2):
    return [layers.Dense(3, activation="tanh"), layers.Dense(units)]


def graph():
    inputs = x = keras.Input((4,))
    for layer in net():
        x = layer(x)
    return inputs, x


def set_up(model, units=2):
    model.hidden, model.out = net(units)


def call(model, inputs, training=None):
    return model.out(model.hidden(inputs))


@register
class Plain(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        set_up(self)

    call = call


@register
class Subclass(RegularizedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        set_up(self)

    call = call


@register
class WithArguments(RegularizedModel):
    def __init__(self, scale, units=2, **kwargs):
        super().__init__(**kwargs)
        set_up(self, units)
        self.scale = scale

    def call(self, inputs, training=None):
        return self.scale * call(self, inputs, training)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "units": self.out.units}


@register
class FunctionalSubclass(RegularizedModel):
    def __init__(self, **kwargs):
        inputs, outputs = graph()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)


@register
class FunctionalWithArguments(RegularizedModel):
    def __init__(self, scale, name=None):
        inputs, outputs = graph()
        super().__init__(inputs, layers.Rescaling(scale)(outputs), name=name)
        self.scale = scale

    def get_config(self):
        return {"scale": self.scale, "name": self.name}


@register
class PlainFunctionalSubclass(keras.Model):
    def __init__(self, **kwargs):
        inputs, outputs = graph()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)


def sequential(built=True):
    return keras.Sequential([*([keras.Input((4,))] if built else []), *net()])


WAYS = {
    "functional": lambda: RegularizedModel(*graph()),
    "subclass": Subclass,
    "subclass, arguments": lambda: WithArguments(0.5),
    "functional subclass": FunctionalSubclass,
    "functional subclass, arguments": lambda: FunctionalWithArguments(0.5),
    "from Functional": lambda: RegularizedModel.from_model(keras.Model(*graph())),
    "from Sequential": lambda: RegularizedModel.from_model(sequential()),
    "from deferred Sequential": lambda: RegularizedModel.from_model(sequential(built=False)),
    "from subclass": lambda: RegularizedModel.from_model(Plain()),
    "from functional subclass": lambda: RegularizedModel.from_model(PlainFunctionalSubclass()),
}
FEW = ["functional", "subclass", "from deferred Sequential", "from subclass"]


def regularizer(beta=3.0):
    return SubBatchPerturbation(0.1, beta, num_sub_batches=2)


def compiled(model, optimizer=None, **kwargs):
    """Compile, eagerly: for a few tiny steps faster than tracing."""
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    kwargs = {"regularizer": regularizer(), "run_eagerly": True, **kwargs}
    model.compile(optimizer, "mse", **kwargs)
    return model


def train(model, steps=1):
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def state(model):
    """Return all that training changes."""
    variables = model.optimizer.variables if model.compiled else []
    return [*model.get_weights(), *(v.numpy() for v in variables)]


def assert_same_state(a, b):
    for x, y in zip(state(a), state(b), strict=True):
        assert_array_equal(x, y)


def assert_different_state(a, b):
    assert any(not np.array_equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def from_file(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


def from_pickle(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def from_deepcopy(model, tmp_path):
    return copy.deepcopy(model)


# Whole models


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_model_trains_on_as_if_it_had_not_been_saved(way, tmp_path):
    model = train(compiled(WAYS[way]()))
    model.regularizer.beta = 20.0
    loaded = from_file(model, tmp_path)
    assert type(loaded) is type(model)
    assert loaded.name == model.name
    assert_same_state(model, loaded)
    assert_array_equal(model(X), loaded(X))
    train(model)
    assert_different_state(model, loaded)
    assert_same_state(model, train(loaded))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_a_loaded_model_fits_on_as_if_it_had_not_been_saved(way, tmp_path):
    def fit(model):
        return model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history

    model = compiled(WAYS[way](), metrics=["mae"], run_eagerly=False)
    fit(model)
    loaded = from_file(model, tmp_path)
    histories = fit(model), fit(loaded)
    assert histories[0] == histories[1]
    assert set(histories[0]) == {"loss", "mae", "infomcr_reg"}
    assert_same_state(model, loaded)


@pytest.mark.parametrize("duplicate", [from_pickle, from_deepcopy])
@pytest.mark.parametrize("way", ["functional", "subclass", "from subclass"])
def test_a_copy_trains_on(way, duplicate, tmp_path):
    model = train(compiled(WAYS[way]()))
    twin = duplicate(model, tmp_path)
    assert type(twin) is type(model)
    assert twin.regularizer is not model.regularizer
    assert twin.regularizer.get_config() == model.regularizer.get_config()
    train(twin)
    assert_different_state(model, twin)
    train(model)
    assert_same_state(model, twin)


@pytest.mark.parametrize("wrap", [False, True])
def test_moving_statistics_come_back(wrap, tmp_path):
    model = keras.Sequential([layers.BatchNormalization(), layers.Dense(2)])
    if not wrap:
        model.build((None, 4))
    model = train(compiled(RegularizedModel.from_model(model)))
    loaded = from_file(model, tmp_path)
    assert_same_state(train(model), train(loaded))


@pytest.mark.parametrize("way", FEW)
def test_hyper_parameters_come_back(way, tmp_path):
    model = WAYS[way]()
    model(X)
    rule = SubBatchPerturbation(0.3, 2.0, 5, "sub_batches", 3, "hessian_vector_product")
    compiled(model, regularizer=rule)
    model.regularizer.beta = 7.0
    model.optimizer.build(model.trainable_variables)
    loaded = from_file(model, tmp_path)
    assert isinstance(loaded.regularizer, SubBatchPerturbation)
    assert loaded.regularizer.get_config() == {
        "alpha": 0.3,
        "beta": 7.0,
        "num_sub_batches": 5,
        "main_gradient": "sub_batches",
        "num_perturbed": 3,
        "estimator": "hessian_vector_product",
    }
    assert loaded.regularizer_active
    assert loaded.run_eagerly
    assert model.regularizer is rule


@pytest.mark.parametrize("way", FEW)
def test_no_regularizer_stays_none_and_a_closed_gate_closed(way, tmp_path):
    model = WAYS[way]()
    model(X)
    model.regularizer_active = False
    compiled(model, "sgd", regularizer=None)
    model.optimizer.build(model.trainable_variables)
    loaded = from_file(model, tmp_path)
    assert loaded.regularizer is None
    assert not loaded.regularizer_active


@pytest.mark.parametrize("way", FEW)
def test_uncompiled_models_come_back_uncompiled(way, tmp_path):
    model = WAYS[way]()
    model(X)
    loaded = from_file(model, tmp_path)
    assert not loaded.compiled
    assert_same_state(model, loaded)


@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_load_without_compiling(way, tmp_path):
    model = train(compiled(WAYS[way]()))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert not loaded.compiled
    assert loaded.regularizer is None
    assert_array_equal(model(X), loaded(X))
    train(compiled(loaded))


@pytest.mark.parametrize("optimizer", ["string", "schedule", "scaled", "ema"])
def test_optimizers_come_back(optimizer, tmp_path):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.1, 0.01])
    optimizer = {
        "string": "adam",
        "schedule": keras.optimizers.SGD(schedule, momentum=0.9),
        "scaled": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
        "ema": keras.optimizers.SGD(0.1, use_ema=True, gradient_accumulation_steps=2),
    }[optimizer]
    model = train(compiled(RegularizedModel(*graph()), optimizer))
    loaded = from_file(model, tmp_path)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same_state(train(model), train(loaded))


def test_several_inputs_and_outputs_come_back(tmp_path):
    inputs = {name: keras.Input((4,), name=name) for name in "ab"}
    outputs = {"sum": layers.Dense(2, name="sum")(layers.Add()(list(inputs.values())))}
    outputs["other"] = layers.Dense(1, name="other")(inputs["b"])
    model = RegularizedModel(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss={"sum": "mse", "other": keras.losses.MeanAbsoluteError()},
        loss_weights={"sum": 1.0, "other": 0.3},
        metrics={"other": ["mae"]},
        run_eagerly=True,
        regularizer=regularizer(),
    )
    batch = {"a": X, "b": X[::-1]}, {"sum": Y, "other": Y[:, :1]}
    model.train_on_batch(*batch)
    loaded = from_file(model, tmp_path)
    model.reset_metrics()
    assert model.train_on_batch(*batch) == loaded.train_on_batch(*batch)
    assert_same_state(model, loaded)


def test_saved_names_stay_the_same(tmp_path):
    """Files of today must load tomorrow."""
    names = {
        "functional": "keras_infomcr>RegularizedFunctional",
        "from subclass": "keras_infomcr>WrappedModel",
    }
    for way, name in names.items():
        model = compiled(WAYS[way]())
        model(X)
        model.save(tmp_path / "model.keras")
        with zipfile.ZipFile(tmp_path / "model.keras") as file:
            config = json.loads(file.read("config.json"))
        assert config["registered_name"] == name
        ours = config["compile_config"]["optimizer"]["keras_infomcr"]
        assert ours["regularizer"]["registered_name"] == "keras_infomcr>SubBatchPerturbation"


def test_a_compiled_original_inside_a_wrapped_model(tmp_path):
    original = Plain()
    original.compile("sgd", "mae", run_eagerly=True)
    original.train_on_batch(X, Y)
    model = train(compiled(RegularizedModel.from_model(original)))
    loaded = from_file(model, tmp_path)
    assert_same_state(model, loaded)
    assert_same_state(model.model, loaded.model)
    assert loaded.model.loss == "mae"
    assert_same_state(train(model), train(loaded))


def test_a_model_with_a_regularized_model_inside_comes_back(tmp_path):
    inner = train(compiled(RegularizedModel(*graph())))
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, inner(inputs))
    outer.compile("adam", "mse", run_eagerly=True)
    outer.train_on_batch(X, Y)
    loaded = from_file(outer, tmp_path)
    assert type(loaded.layers[1]) is type(inner)
    for model in outer, loaded:
        model.train_on_batch(X, Y)
    assert_same_state(outer, loaded)


@register
class WithItsOwnCompile(Subclass):
    def compile(self, *args, extra=1, **kwargs):
        super().compile(*args, **kwargs)
        self.extra = extra


def test_a_custom_compile_gets_the_warning_that_keras_gives(tmp_path):
    model = train(compiled(WithItsOwnCompile(), extra=2))
    with pytest.warns(UserWarning, match=r"`compile\(\)` was not called as part of model loading"):
        loaded = from_file(model, tmp_path)
    assert_array_equal(model(X), loaded(X))


@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_unzipped_directory(way, tmp_path):
    model = train(compiled(WAYS[way]()))
    model.save(tmp_path / "model", zipped=False)
    assert_same_state(train(model), train(keras.saving.load_model(tmp_path / "model")))


# Weight files


PAIRS = {
    "functional": (lambda: keras.Model(*graph()), WAYS["functional"]),
    "subclass": (Plain, Subclass),
    "functional subclass": (PlainFunctionalSubclass, FunctionalSubclass),
    "from Functional": (lambda: keras.Model(*graph()), WAYS["from Functional"]),
    "from Sequential": (sequential, WAYS["from Sequential"]),
    "from deferred Sequential": (
        lambda: sequential(built=False),
        WAYS["from deferred Sequential"],
    ),
    "from subclass": (Plain, WAYS["from subclass"]),
    "from functional subclass": (PlainFunctionalSubclass, WAYS["from functional subclass"]),
}


def prepared(make, is_compiled, steps=0):
    model = make()
    model(X)
    if is_compiled:
        if isinstance(model, RegularizedModel):
            compiled(model, regularizer=None)
        else:
            model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", run_eagerly=True)
        model.optimizer.build(model.trainable_variables)
        train(model, steps)
    return model


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_weight_files_are_those_of_a_plain_model(pair, is_compiled, tmp_path):
    path = tmp_path / "model.weights.h5"
    for source, target in (PAIRS[pair], PAIRS[pair][::-1]):
        source = prepared(source, is_compiled, steps=1)
        target = prepared(target, is_compiled)
        assert_different_state(source, target)
        source.save_weights(path)
        target.load_weights(path)
        assert_same_state(source, target)


@pytest.mark.parametrize("way", ["subclass", "functional subclass", "from subclass"])
def test_weight_files_load_back_and_training_goes_on(way, tmp_path):
    source, target = train(compiled(WAYS[way]())), compiled(WAYS[way]())
    target(X)
    target.optimizer.build(target.trainable_variables)
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(train(source), train(target))


@pytest.mark.parametrize("pair", PAIRS)
def test_no_extra_weights(pair):
    plain, model = (prepared(make, True) for make in PAIRS[pair])
    for kind in ("weights", "trainable_weights", "non_trainable_weights", "variables"):
        ours, theirs = (
            [(v.shape, v.dtype) for v in getattr(m, kind) if "metric" not in v.path]
            for m in (model, plain)
        )
        assert ours == theirs
    assert len(model.metrics_names) == len(plain.metrics_names)
    assert len(model.optimizer.variables) == len(plain.optimizer.variables)
    assert model.count_params() == plain.count_params()


@pytest.mark.parametrize(
    "pair", ["functional", "subclass", "from deferred Sequential", "from functional subclass"]
)
def test_weights_of_whole_model_files(pair, tmp_path):
    """`load_weights` also reads `.keras` files."""
    make_plain, make_ours = PAIRS[pair]
    path = tmp_path / "model.keras"
    for make_source in (make_ours, make_plain):
        source, target = prepared(make_source, True, steps=1), prepared(make_ours, True)
        source.save(path)
        target.load_weights(path)
        assert_same_state(source, target)


@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_sharded_weight_files(way, tmp_path):
    source, target = prepared(WAYS[way], True, steps=1), prepared(WAYS[way], True)
    source.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-7)
    assert len(list(tmp_path.glob("*.weights.h5"))) > 1
    target.load_weights(tmp_path / "model.weights.json")
    assert_same_state(source, target)


def test_a_wrapped_model_of_another_shape_is_refused(tmp_path):
    source, target = prepared(WAYS["from subclass"], True), WAYS["from subclass"]()
    source.save_weights(tmp_path / "model.weights.h5")
    target(X[:, :3])
    before = target.get_weights()
    with pytest.raises(ValueError, match="could not be loaded"):
        target.load_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match="could not be loaded"):
        target.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    assert_array_equal(before[0], target.get_weights()[0])
    assert_array_equal(source.get_weights()[-1], target.get_weights()[-1])


def test_a_wrapped_model_keeps_the_state_of_a_compiled_original(tmp_path):
    original = prepared(Plain, True, steps=1)
    optimizer = original.optimizer
    model = train(compiled(RegularizedModel.from_model(original)))
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert original.optimizer is optimizer
    assert int(optimizer.iterations) == 1
    assert not hasattr(original, "learning_rate_peak")
    assert int(model.optimizer.iterations) == 1


# Callbacks, export


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_model_checkpoint(way, weights_only, tmp_path):
    path = str(tmp_path / ("c.weights.h5" if weights_only else "c.keras"))
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, monitor="infomcr_reg", mode="min", save_best_only=True, save_weights_only=weights_only
    )
    model = compiled(WAYS[way]())
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[checkpoint])
    if weights_only:
        loaded = prepared(WAYS[way], True)
        loaded.load_weights(path)
    else:
        loaded = keras.saving.load_model(path)
    assert_same_state(model, loaded)
    assert np.isfinite(checkpoint.best)


@only_on("tensorflow", reason="needs TensorFlow")
@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_export(way, tmp_path):
    import tensorflow as tf

    model = train(compiled(WAYS[way]()))
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    assert_allclose(served.serve(X), model(X), rtol=1e-6, atol=1e-6)


def test_whole_model_in_the_old_h5_form(tmp_path):
    """It is loaded as a model that predicts the same, and trains when it is compiled again.

    Not before: Keras builds the loaded optimizer for no weights.
    """
    inputs = keras.Input((4,))
    outputs = LogitNormalization()(layers.Dense(2)(inputs))
    model = RegularizedModel(inputs, outputs)
    model.compile("adam", keras.losses.MeanSquaredError())
    model.fit(X, Y, verbose=0)
    path = tmp_path / "model.h5"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded) is type(model)
    assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    for each in (loaded, model):
        each.compile(keras.optimizers.SGD(0.1), "mse", regularizer=SubBatchPerturbation())
    logs, expected = (e.fit(X, Y, shuffle=False, verbose=0).history for e in (loaded, model))
    assert logs == expected
    assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])
