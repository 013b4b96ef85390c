"""gamma-hat in the logs of `fit`: when, for whom, and without a trace in the training."""

import csv
import gc
import math
import os
import re
import warnings

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, global_random_number
from keras import layers

from keras_infomcr import GammaHatCallback, RegularizedModel
from keras_infomcr.callbacks import FlatnessCallback
from keras_infomcr.flatness import GammaHat, gamma_hat, hessian_trace
from keras_infomcr.regularizers import SubBatchPerturbation

NUM_CLASSES = 4
DRAW = {"num_examples": 5, "num_trials": 2}
NAN = math.nan


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


def compiled(model, optimizer="sgd", **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **kwargs)
    return model


def classifier(optimizer="sgd", stack=()):
    last = layers.Dense(NUM_CLASSES)
    return compiled(keras.Sequential([keras.Input((6,)), *stack, last]), optimizer)


def unchanging():
    return classifier(keras.optimizers.SGD(0.0))


class Record(keras.callbacks.Callback):
    """Stands for any callback that reads the logs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append((logs["gamma_hat"], logs["gamma_hat_stderr"]))


class Stop(keras.callbacks.Callback):
    """Stops training at the end of an epoch, or within one."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.epoch, self.batch, self.now = epoch, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch and batch == self.batch:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.batch is None:
            self.model.stop_training = True


# ---------------------------------------------------------------- when it measures


@pytest.mark.parametrize(
    ("frequency", "epochs", "initial_epoch", "measured"),
    [
        (1, 3, 0, [True, True, True]),
        (2, 5, 0, [False, True, False, True, True]),
        (3, 6, 2, [True, False, False, True]),
        (10, 2, 0, [False, True]),
    ],
)
def test_every_so_many_epochs_and_after_the_last(data, frequency, epochs, initial_epoch, measured):
    """The keys stand in the logs of each epoch: `CSVLogger` freezes its columns at the first."""
    callback = GammaHatCallback(data, frequency=frequency, **DRAW)
    history = classifier().fit(
        *data, epochs=epochs, initial_epoch=initial_epoch, callbacks=[callback], verbose=0
    )
    for key in ("gamma_hat", "gamma_hat_stderr"):
        assert list(np.isfinite(history.history[key])) == measured
        assert all(type(value) is float for value in history.history[key])


def test_logged_values_are_those_of_gamma_hat(data):
    """Of the weights and the batch-norm statistics at the end of the epoch."""
    model = classifier("adam", [layers.Dense(8), layers.BatchNormalization()])
    callback = GammaHatCallback(data, **DRAW)
    history = model.fit(*data, epochs=2, batch_size=5, callbacks=[callback], verbose=0).history
    expected = gamma_hat(model, *data, seed=0, **DRAW)
    assert isinstance(callback.result, GammaHat)
    # The same graph on the same numbers.
    np.testing.assert_allclose(callback.result.trials, expected.trials, rtol=1e-6)
    assert history["gamma_hat"][-1] == callback.result.value
    assert history["gamma_hat_stderr"][-1] == callback.result.stderr
    assert history["gamma_hat"][0] != pytest.approx(history["gamma_hat"][1], rel=1e-4)


@pytest.mark.slow
def test_settings_reach_gamma_hat(data):
    model = classifier(keras.optimizers.SGD(0.0), [layers.Dense(8), layers.BatchNormalization()])
    settings = {"normalize_softmax": True, "softmax_scale": 0.5, "training": True}
    settings |= {"chunk_size": 3, "seed": 7, **DRAW}
    callback = GammaHatCallback(data, **settings)
    model.fit(*data, callbacks=[callback], verbose=0)
    expected = gamma_hat(model, *data, **settings)
    np.testing.assert_allclose(callback.result.trials, expected.trials, rtol=1e-5)


def test_same_examples_in_every_epoch(data):
    """Of weights that do not change the values do not either."""
    callback = GammaHatCallback(data, **DRAW)
    history = unchanging().fit(*data, epochs=3, callbacks=[callback], verbose=0).history
    assert len(set(history["gamma_hat"])) == 1


def test_no_seed_is_one_draw_for_a_run(data):
    callback = GammaHatCallback(data, seed=None, **DRAW)
    model = unchanging()
    runs = [model.fit(*data, epochs=2, callbacks=[callback], verbose=0).history for _ in range(2)]
    first, second = (set(run["gamma_hat"]) for run in runs)
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize("order", ["before", "after"])
def test_early_stopping_leaves_a_measurement_of_the_final_weights(data, order, capsys):
    model = classifier()
    callback = GammaHatCallback(data, frequency=10, verbose=1, **DRAW)
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1)  # the loss falls
    callbacks = [stop, callback] if order == "before" else [callback, stop]
    history = model.fit(*data, epochs=9, callbacks=callbacks, verbose=0).history
    assert len(history["loss"]) == 2
    expected = gamma_hat(model, *data, seed=0, **DRAW).value
    assert callback.result.value == pytest.approx(expected, rel=1e-6)
    logged = [NAN, callback.result.value if order == "before" else NAN]
    np.testing.assert_equal(history["gamma_hat"], logged)
    when = "Epoch 2" if order == "before" else "End of training"
    assert re.match(rf"{when}: gamma_hat ", capsys.readouterr().out)


def test_training_stopped_within_an_epoch(data):
    callback = GammaHatCallback(data, frequency=10, **DRAW)
    history = classifier().fit(
        *data, batch_size=5, epochs=9, callbacks=[Stop(1, batch=2), callback], verbose=0
    )
    assert list(np.isfinite(history.history["gamma_hat"])) == [False, True]


def test_final_weights_are_not_measured_twice(data, capsys):
    callback = GammaHatCallback(data, verbose=1, **DRAW)
    classifier().fit(*data, epochs=9, callbacks=[callback, Stop(1)], verbose=0)
    assert capsys.readouterr().out.count("Epoch") == 2


def test_no_epoch_no_measurement(data):
    callback = GammaHatCallback(data, **DRAW)
    classifier().fit(*data, epochs=0, callbacks=[callback], verbose=0)
    assert callback.result is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
def test_second_run_and_recompiled_model(data):
    x, y = data
    model = classifier()
    callback = GammaHatCallback(data, **DRAW)
    model.fit(x, y, callbacks=[callback], verbose=0)
    first = callback.result
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="normalize_softmax"):
        bad = GammaHatCallback(data, normalize_softmax=True, **DRAW)
        model.fit(x, np.eye(NUM_CLASSES)[y], callbacks=[bad], verbose=0)
    callback.data = x, np.eye(NUM_CLASSES)[y]
    model.fit(x, np.eye(NUM_CLASSES)[y], callbacks=[callback], verbose=0)
    assert first.log_loss_part < 0
    assert callback.result.log_loss_part == 0  # no cross-entropy any more


# ---------------------------------------------------------------- who sees the values


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


def test_diverged_training_is_logged_as_nan(data):
    model = classifier()
    model.layers[0].bias.assign([NAN] * NUM_CLASSES)
    callback = GammaHatCallback(data, **DRAW)
    with pytest.warns(UserWarning, match="gamma_hat is not finite: gradients are not finite"):
        history = model.fit(*data, epochs=2, callbacks=[callback], verbose=0).history
    assert all(map(math.isnan, history["gamma_hat"]))


# ---------------------------------------------------------------- models and data


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = layers.Dense(NUM_CLASSES)

    def call(self, inputs):
        return self.last(inputs)


@pytest.mark.parametrize(
    "make",
    [lambda: keras.Sequential([layers.Dense(NUM_CLASSES)]), Subclassed],
    ids=["Sequential", "subclass"],
)
def test_models_that_are_built_by_fit(data, make):
    model = compiled(make())
    callback = GammaHatCallback(data, **DRAW)
    history = model.fit(*data, callbacks=[callback], verbose=0).history
    expected = gamma_hat(model, *data, seed=0, **DRAW).value
    assert history["gamma_hat"] == [pytest.approx(expected, rel=1e-6)]


def test_model_under_a_distribution_strategy(data, mirrored):
    with mirrored.scope():
        model = classifier(stack=[layers.Dense(8), layers.BatchNormalization()])
    plain = classifier(stack=[layers.Dense(8), layers.BatchNormalization()])
    callback = GammaHatCallback(data, **DRAW)
    model.fit(*data, batch_size=10, callbacks=[callback], verbose=0)
    plain.set_weights(model.get_weights())
    expected = gamma_hat(plain, *data, seed=0, **DRAW)
    np.testing.assert_allclose(callback.result.trials, expected.trials, rtol=1e-6)


def dataset(x, y):
    return pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices((x, y))


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: dataset(x, y).batch(4),
        lambda x, y: [(x[:13], y[:13]), (x[13:], y[13:])],
        lambda x, y: (x, y, np.ones(20)),
        lambda x, y: (array(x), np.eye(NUM_CLASSES)[y]),
    ],
    ids=["dataset", "list of batches", "weighted", "tensors"],
)
def test_data_of_any_kind(data, make):
    settings = {"num_examples": 5, "num_trials": 4}  # which use every example
    model = unchanging()
    callbacks = [GammaHatCallback(d, **settings) for d in (data, make(*data))]
    model.fit(*data, callbacks=callbacks, verbose=0)
    arrays, others = (callback.result.trials for callback in callbacks)
    np.testing.assert_allclose(others, arrays, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "ours", "training"),
    [
        (keras.Model, {}, False),
        (keras.Model, {}, True),
        (RegularizedModel, {"regularizer": SubBatchPerturbation(num_sub_batches=2)}, False),
    ],
    ids=["plain", "training", "regularized"],
)
def test_training_is_the_same_to_the_bit_with_and_without(data, base, ours, training):
    """With dropout, batch normalisation, shuffling and momentum; global random numbers too."""
    x, y = data
    results = []
    for measured in (False, True):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        hidden = layers.BatchNormalization()(layers.Dense(8, "relu")(inputs))
        model = base(inputs, layers.Dense(NUM_CLASSES)(layers.Dropout(0.5)(hidden)))
        compiled(model, keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"], **ours)
        callback = GammaHatCallback((x, y), training=training, **DRAW)
        history = model.fit(
            x, y, batch_size=8, epochs=2, callbacks=[callback] if measured else [], verbose=0
        ).history
        assert ("infomcr_reg" in history) == bool(ours)
        results.append([
            [v.numpy() for v in model.variables + model.optimizer.variables],
            {k: v for k, v in history.items() if not k.startswith("gamma_hat")},
            [np.random.random(), global_random_number()],
        ])  # fmt: skip
    np.testing.assert_equal(*results)


class Halved(keras.Model):
    """Preprocesses in `fit`, `evaluate` and `predict`, as the tasks of KerasHub do."""

    def __init__(self):
        inputs = keras.Input((6,))
        super().__init__(inputs, layers.Dense(NUM_CLASSES)(inputs))

    def preprocess_samples(self, x, y=None, sample_weight=None):
        x = np.asarray(x["of_users"]) / 2
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(self, x, y, **kwargs):
        return super().fit(*self.preprocess_samples(x, y), **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: ({"of_users": x}, y),
        lambda x, y: ({"of_users": x}, y, np.ones(20)),
        lambda x, y: [({"of_users": x[:8]}, y[:8]), ({"of_users": x[8:]}, y[8:])],
    ],
    ids=["arrays", "weighted", "batches"],
)
def test_a_model_that_preprocesses_its_data_is_measured_on_what_it_sees(data, make):
    x, y = data
    model = compiled(Halved(), keras.optimizers.SGD(0.0))
    settings = {"num_examples": 10, "num_trials": 2}  # all of the data
    gamma, trace = (
        GammaHatCallback(make(x, y), **settings),
        FlatnessCallback(make(x, y), ["hessian_trace"]),
    )
    model.fit({"of_users": x}, y, epochs=2, callbacks=[gamma, trace], verbose=0)
    expected = gamma_hat(model, x / 2, y, seed=0, **settings)
    # The same numbers through the same graph.
    np.testing.assert_allclose(gamma.result.trials, expected.trials, rtol=1e-6)
    expected = hessian_trace(model, x / 2, y, seed=0).value
    # Batches of 8 and 12 are added up in another order than one of 20.
    assert trace.results["hessian_trace"].value == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- errors


def test_data_and_labels_in_two_arguments(data):
    message = r"`data` must be one tuple `\(x, y\)`\. Received: data of type .* Put parentheses"
    for labels in (data[1], array(data[1])):
        with pytest.raises(ValueError, match=message):
            GammaHatCallback(data[0], labels)
        with pytest.raises(ValueError, match=message):
            FlatnessCallback(data[0], labels, ["hessian_trace"])


def test_a_loss_that_is_no_cross_entropy_is_told_at_the_beginning(data):
    model = classifier()
    model.compile("sgd", "mse")
    with pytest.raises(UserWarning, match="It is no gamma-hat of a classifier"):
        model.fit(data[0], np.eye(NUM_CLASSES)[data[1]], callbacks=[
            GammaHatCallback((data[0], np.eye(NUM_CLASSES)[data[1]]), **DRAW)
        ])  # fmt: skip
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequency": 0}, "`frequency` must be an integer of at least 1. Received: frequency=0"),
        ({"frequency": 1.5}, "`frequency` must be an integer of at least 1."),
        ({"verbose": 2}, "`verbose` must be one of 0, 1. Received: verbose=2"),
        ({"verbose": "auto"}, "`verbose` must be one of 0, 1. Received: verbose='auto'"),
        ({"num_examples": 0}, "`num_examples` must be an integer of at least 1."),
        ({"num_trials": None}, "`num_trials` must be an integer of at least 1."),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1."),
        ({"softmax_scale": -1}, "`softmax_scale` must be a finite number greater than 0."),
        ({"training": None}, "`training` must be `True` or `False`. Received: training=None"),
        ({"normalize_softmax": 1}, "`normalize_softmax` must be `True` or `False`."),
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(data, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GammaHatCallback(data, **arguments)


def with_nan(x):
    x = x.copy()
    x[2] = NAN
    return x


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda x, y: (with_nan(x), y), {}, ValueError, "`x` must be finite."),
        (lambda x, y: (x, y + 3), {}, ValueError, "`y` must hold integers from 0 to 3"),
        (lambda x, y: (x, y[:7]), {}, ValueError, "the same number of examples."),
        (lambda x, y: (x, y), {"num_examples": 21}, ValueError, "`num_examples` must not exceed"),
        (lambda x, y: (x, None), {}, ValueError, "Labels are needed."),
        (lambda x, y: (x,), {}, ValueError, "Labels are needed."),
        (lambda x, y: x, {}, ValueError, "Labels are needed."),
        (lambda x, y: None, {}, TypeError, "must be an array"),
        (lambda x, y: dataset(x, y), {}, ValueError,
         "The data must come in batches."),
    ],
    ids=["nan", "labels", "lengths", "too few", "y is None", "tuple of x", "x", "None",
         "unbatched"],
)  # fmt: skip
def test_errors_come_before_any_weight_changes(data, make, arguments, error, message):
    callback = GammaHatCallback(make(*data), **{**DRAW, **arguments})
    assert_refused_before_training(classifier(), data, callback, error, message)


def test_labels_of_a_model_that_is_not_built_are_checked_as_soon_as_it_is(data):
    model = compiled(keras.Sequential([layers.Dense(NUM_CLASSES)]))
    callback = GammaHatCallback((data[0], data[1] + 3), **DRAW)
    message = "`y` must hold integers from 0 to 3"
    # TensorFlow builds it in the first step, the others before.
    num_steps = 1 if BACKEND == "tensorflow" else 0
    assert_refused_before_training(model, data, callback, ValueError, message, num_steps)


def assert_refused_before_training(model, data, callback, error, message, num_steps=0):
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    with pytest.raises(error, match=re.escape(message)):
        model.fit(*data, batch_size=5, callbacks=[count, callback], verbose=0)
    assert len(steps) == num_steps


def test_model_without_a_loss(data):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.ActivityRegularization(1.0)(layers.Dense(4)(inputs)))
    model.compile("sgd")
    with pytest.raises(ValueError, match=re.escape("The model must be compiled with a loss.")):
        model.fit(*data, callbacks=[GammaHatCallback(data, **DRAW)], verbose=0)


def resident_kib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class Traced(layers.Layer):
    """Counts the calls of its Python code: the compilations, where the framework compiles."""

    count = 0

    def call(self, inputs):
        Traced.count += 1
        return inputs


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's memory record")
def test_200_epochs_compile_nothing_new_and_keep_no_memory(digits):
    """If each measurement kept as little as its Gram matrices, 150 of them would be 36 MiB."""
    x, y = digits[0][:200], digits[1][:200]
    stack = [layers.Dense(32, "tanh"), Traced(), layers.BatchNormalization(), layers.Dense(10)]
    model = compiled(keras.Sequential([keras.Input((64,)), *stack]))
    seen = []

    class See(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch in (49, 199):
                gc.collect()
                seen.append((Traced.count, resident_kib()))

    callbacks = [GammaHatCallback((x, y), num_trials=1), See()]
    model.fit(x, y, batch_size=200, epochs=200, callbacks=callbacks, verbose=0)
    counts, resident = zip(*seen)
    if BACKEND != "torch":  # which compiles nothing
        assert counts[0] == counts[1]
    assert resident[1] - resident[0] < 12 * 1024
