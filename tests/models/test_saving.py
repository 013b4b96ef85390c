"""Whole models in files and copies: what comes back, and that training goes on."""

import copy
import json
import pickle
import zipfile

import keras
import numpy as np
import pytest
from frameworks import assert_allclose, assert_array_equal, only_on
from keras import layers
from models_to_save import (
    FEW,
    WAYS,
    Plain,
    Subclass,
    X,
    Y,
    assert_different_state,
    assert_same_state,
    compiled,
    from_file,
    graph,
    prepared,
    register,
    regularizer,
    train,
)
from parameters import slow_but

from keras_infomcr import RegularizedModel
from keras_infomcr.layers import LogitNormalization
from keras_infomcr.regularizers import SubBatchPerturbation


def from_pickle(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def from_deepcopy(model, tmp_path):
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    "way",
    slow_but(
        WAYS,
        "functional",
        "subclass",
        "functional subclass, arguments",
        "from deferred Sequential",
    ),
)
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
@pytest.mark.parametrize(
    "way", slow_but(["functional", "subclass", "from subclass"], "from subclass")
)
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
    """A file that was saved today must load with later versions: its names must not change."""
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


# Checkpoints, exports and old forms


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("way", slow_but(["functional", "from subclass"], "from subclass"))
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


@only_on("tensorflow", reason="The test loads the export with TensorFlow.")
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
    model.compile("adam", keras.losses.MeanSquaredError(), run_eagerly=True)
    model.fit(X, Y, verbose=0)
    path = tmp_path / "model.h5"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded) is type(model)
    assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    for each in (loaded, model):
        optimizer = keras.optimizers.SGD(0.1)
        each.compile(optimizer, "mse", run_eagerly=True, regularizer=SubBatchPerturbation())
    logs, expected = (e.fit(X, Y, shuffle=False, verbose=0).history for e in (loaded, model))
    assert logs == expected
    assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])
