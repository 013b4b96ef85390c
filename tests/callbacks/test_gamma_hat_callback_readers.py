"""Who sees what `GammaHatCallback` logs: other callbacks, files, and the terminal."""

import csv
import math
import re
import warnings

import keras
import numpy as np
import pytest
from measured_nets import DRAW, NAN, NUM_CLASSES, Stop, classifier, unchanging

from keras_infomcr import GammaHatCallback


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


class Record(keras.callbacks.Callback):
    """Stands for any callback that reads the logs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append((logs["gamma_hat"], logs["gamma_hat_stderr"]))


def test_other_callbacks_see_the_values(data, tmp_path):
    callback, record = GammaHatCallback(data, frequency=2, **DRAW), Record()
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = unchanging().fit(*data, epochs=4, callbacks=[callback, record, log], verbose=0)
    seen = history.history["gamma_hat"], history.history["gamma_hat_stderr"]
    np.testing.assert_equal(np.transpose(record.seen), seen)
    with (tmp_path / "log.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for key, expected in zip(("gamma_hat", "gamma_hat_stderr"), seen):
        np.testing.assert_equal([float(row[key]) for row in rows], expected)


def best_of(path):
    """Return a `ModelCheckpoint` that names its file by epoch and gamma-hat."""
    return keras.callbacks.ModelCheckpoint(
        path / "{epoch}_{gamma_hat:.3f}.weights.h5",
        monitor="gamma_hat",
        mode="min",
        save_best_only=True,
        save_weights_only=True,
    )


READERS = {
    "CSVLogger": lambda path: keras.callbacks.CSVLogger(path / "log.csv"),
    "TensorBoard": lambda path: keras.callbacks.TensorBoard(path),
    "History": lambda path: keras.callbacks.History(),
    "EarlyStopping": lambda path: keras.callbacks.EarlyStopping("gamma_hat", mode="min"),
    "ModelCheckpoint": best_of,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_callback_that_reads_the_logs_too_early_is_named(data, tmp_path, name):
    if name == "TensorBoard":
        pytest.importorskip("tensorboard", reason="TensorFlow no longer installs it")
    model, reader = classifier(), READERS[name](tmp_path)
    callbacks = [reader, GammaHatCallback(data, **DRAW)]
    message = rf"must stand before .* in which \['{name}'\] will not see \['gamma_hat', .* first\."
    with pytest.raises(UserWarning, match=message):  # warnings are errors here
        model.fit(*data, callbacks=callbacks, verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_no_warning_of_callbacks_that_read_something_else(data):
    before = [keras.callbacks.EarlyStopping("loss"), Stop(9), GammaHatCallback(data, **DRAW)]
    classifier().fit(*data, callbacks=[*before, Record()], verbose=0)


@pytest.fixture
def keras_writes_files():
    """Keras 3.15 with NumPy 2.4 warns in every file it writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
        yield


def test_checkpoints_of_the_best(data, tmp_path, keras_writes_files):
    callback = GammaHatCallback(data, **DRAW)
    unchanging().fit(*data, epochs=3, callbacks=[callback, best_of(tmp_path)], verbose=0)
    # The same value again is no improvement.
    expected = f"1_{callback.result.value:.3f}.weights.h5"
    assert [path.name for path in tmp_path.iterdir()] == [expected]


def test_early_stopping_on_gamma_hat(data):
    """Of weights that do not change gamma-hat never falls below the first."""
    callbacks = [GammaHatCallback(data, **DRAW)]
    callbacks += [keras.callbacks.EarlyStopping("gamma_hat", mode="min", patience=2)]
    history = unchanging().fit(*data, epochs=9, callbacks=callbacks, verbose=0).history
    assert len(history["gamma_hat"]) == 3


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_prints_a_line_for_each_measurement(data, capsys, verbose):
    callback = GammaHatCallback(data, frequency=2, verbose=verbose, **DRAW)
    classifier().fit(*data, epochs=3, callbacks=[callback], verbose=0)
    lines = capsys.readouterr().out.splitlines()
    number = r"-?[\d.]+"
    assert len(lines) == 3 * verbose
    for line, epoch in zip(lines, (2, 3)):
        assert re.fullmatch(rf"Epoch {epoch}: gamma_hat {number} \+- {number} \(\d+\.\d s\)", line)
    if verbose:
        assert f"{callback.result.value:#.5g} +- {callback.result.stderr:#.3g}" in lines[1]
        assert re.fullmatch(r"gamma_hat takes \d+\.\d % of an epoch's time", lines[2])


def test_infinite_value_is_logged_with_one_warning(data):
    x, y = np.repeat(data[0][:1], 20, axis=0), np.zeros(20)
    callback = GammaHatCallback((x, y), **DRAW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        history = classifier().fit(*data, epochs=3, callbacks=[callback], verbose=0).history
    assert history["gamma_hat"] == [-math.inf] * 3
    assert all(map(math.isnan, history["gamma_hat_stderr"]))
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "gamma_hat is not finite: 4 of the 5 examples of the trial" in str(caught[0].message)
    assert "The data hold 19 copies of other examples among their 20" in str(caught[0].message)


@pytest.mark.slow
def test_diverged_training_is_logged_as_nan(data):
    model = classifier()
    model.layers[0].bias.assign([NAN] * NUM_CLASSES)
    callback = GammaHatCallback(data, **DRAW)
    with pytest.warns(UserWarning, match="gamma_hat is not finite: gradients are not finite"):
        history = model.fit(*data, epochs=2, callbacks=[callback], verbose=0).history
    assert all(map(math.isnan, history["gamma_hat"]))
