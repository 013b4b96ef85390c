"""What `fit` logs of the regulariser, and where it is seen."""

import csv

import keras
import numpy as np
import pytest
from literal_reading import ALPHA, BETA
from parameters import with_slow
from small_nets import QUICKEST, X, Y, sgd, two_layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


def test_log_is_written_every_epoch(tmp_path):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    gate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(model, "regularizer_active", epoch == 1)
    )
    path = tmp_path / "log.csv"
    history = model.fit(
        X, Y, 5, 3, 0, callbacks=[keras.callbacks.CSVLogger(path), gate], validation_data=(X, Y)
    ).history
    assert np.isfinite(history["infomcr_reg"]).tolist() == [False, True, False]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert np.isfinite([float(r["infomcr_reg"]) for r in rows]).tolist() == [False, True, False]


def test_log_is_seen_by_callbacks_and_by_the_progress_bar(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    seen = []
    spy = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    history = model.fit(X, Y, callbacks=spy, verbose=2).history
    assert seen[0]["infomcr_reg"] == history["infomcr_reg"][0] > 0
    assert "infomcr_reg" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", with_slow(["auto", 1, 2], 1))
def test_the_progress_bar_shows_the_regulariser_in_the_epochs_in_which_it_acts(verbose, capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    gate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(model, "regularizer_active", epoch == 1)
    )
    settings = {"epochs": 3, "callbacks": gate, "validation_data": (X, Y), "verbose": verbose}
    history = model.fit(X, Y, **settings).history
    shown = capsys.readouterr().out.split("Epoch ")[1:]
    assert ["infomcr_reg" in epoch for epoch in shown] == [False, True, False]
    assert all("val_loss" in epoch for epoch in shown)
    assert np.isnan(history["infomcr_reg"]).tolist() == [True, False, True]


def test_the_progress_bar_shows_a_regulariser_that_is_not_finite(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    with pytest.warns(UserWarning, match="The regulariser is not finite"):
        model.fit(np.full_like(X, np.nan), Y, verbose=2)
    assert "infomcr_reg: nan" in capsys.readouterr().out


def test_the_progress_bar_stands_where_the_user_wants_it(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    model.fit(X, Y, callbacks=[keras.callbacks.ProgbarLogger()], verbose=2)
    assert capsys.readouterr().out.count("infomcr_reg") == 1
    model.fit(X, Y, verbose=0)
    assert capsys.readouterr().out == ""


def test_the_progress_bar_makes_no_callback_wait(monkeypatch):
    """Keras calls callbacks in the background unless one of the user's forbids it."""
    lists, make = [], keras.callbacks.CallbackList.__init__

    def noting(self, *args, **kwargs):
        make(self, *args, **kwargs)
        lists.append(self)

    monkeypatch.setattr(keras.callbacks.CallbackList, "__init__", noting)
    for base, ours in ((RegularizedModel, {"regularizer": SubBatchPerturbation(0.1, 1, 2)}),
                       (keras.Model, {})):  # fmt: skip
        model = two_layers(base)
        model.compile(sgd(), "mse", **ours, **QUICKEST)
        model.fit(X, Y, verbose=2)
    assert lists[0]._async_train == lists[1]._async_train


def test_log_with_a_callback_list_of_the_users():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2), **QUICKEST)
    for _ in range(2):
        callbacks = keras.callbacks.CallbackList(add_history=True, model=model, epochs=1)
        history = model.fit(X, Y, callbacks=callbacks, verbose=0).history
        assert len(history["infomcr_reg"]) == 1
