"""What a `ReplicatedModel` keeps in files: all replicas, their centre and the coupling."""

import keras
import numpy as np
import pytest
from frameworks import assert_array_equal, only_on
from test_replicated_model import EAGER, FIT, X, Y, flat, normalized, sgd, subclass

from keras_infomcr.models import ReplicatedModel

EPOCHS = 4


def compiled(make=normalized):
    model = ReplicatedModel(make(), 2)
    model.compile(sgd(momentum=0.5), "mse", metrics=["mae"], **EAGER)
    return model


def fit(model, **kwargs):
    return model.fit(X[:16], Y[:16], **{"epochs": EPOCHS, **FIT, **kwargs}).history


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


def assert_same(model, other):
    assert_array_equal(flat(model.variables), flat(other.variables))
    assert_array_equal(flat(model.optimizer.variables), flat(other.optimizer.variables))


@pytest.mark.parametrize("make", [normalized, pytest.param(subclass, marks=pytest.mark.slow)])
def test_a_loaded_model_trains_on_as_if_it_had_not_been_saved(make, tmp_path):
    model = compiled(make)
    fit(model, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is ReplicatedModel
    assert_same(model, loaded)
    histories = [fit(m, initial_epoch=3) for m in (model, loaded)]
    assert histories[0] == histories[1]
    assert_same(model, loaded)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    runs, start = [], None
    for callbacks in ([], [keras.callbacks.BackupAndRestore(tmp_path)]):
        model = compiled()
        start = start or model.get_weights()
        model.set_weights(start)
        if callbacks:
            with pytest.raises(InterruptedError):
                fit(model, callbacks=[*callbacks, Stop()])
            model = compiled()  # as a new process would
        runs.append((model, fit(model, callbacks=callbacks)))
    (model, history), (resumed, last) = runs
    assert_same(model, resumed)
    assert {name: values[2:] for name, values in history.items()} == last


def test_weight_files(tmp_path):
    model, other = compiled(), ReplicatedModel(normalized(), 2)
    fit(model, epochs=1)
    model.save_weights(tmp_path / "all.weights.h5")
    other.load_weights(tmp_path / "all.weights.h5")
    assert_array_equal(flat(model.weights), flat(other.weights))
    for part in (model.centre, model.replicas[1]):
        part.save_weights(tmp_path / "part.weights.h5")
        plain = normalized()
        plain.load_weights(tmp_path / "part.weights.h5")
        assert_array_equal(flat(plain.weights), flat(part.weights))


def test_configuration_comes_back():
    model = ReplicatedModel(normalized(), 2, 0.5, 1.25, True, name="pair")
    config = ReplicatedModel.from_config(model.get_config()).get_config()
    assert config == model.get_config()


@pytest.mark.slow
@only_on("tensorflow", reason="Keras exports from other backends by further packages.")
def test_the_centre_is_exported(tmp_path):
    import tensorflow as tf

    model = compiled()
    fit(model)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    # A graph may add up in another order.
    np.testing.assert_allclose(exported.serve(X), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    assert len(exported.variables) == len(model.centre.variables)
