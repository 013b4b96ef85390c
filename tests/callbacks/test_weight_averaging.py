"""The mean of weights, against NumPy means of weights that another callback records."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import callbacks, layers

from keras_infomcr import RegularizedModel
from keras_infomcr.callbacks import WeightAveraging
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 1)).astype("float32")
STEPS = 2  # an epoch
# A mean of n float32 weights that is updated n times is rounded n times.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def net(frozen=False, dropout=0.2):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="tanh", name="first"),
            layers.BatchNormalization(momentum=0.5),
            layers.Dropout(dropout, seed=3),
            layers.Dense(1),
        ]
    )
    model.layers[0].trainable = not frozen
    return model


def compiled(model=None, optimizer=None, **kwargs):
    model = model or net()
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", run_eagerly=BACKEND != "jax", **kwargs)
    return model


def weights(model):
    return [np.array(keras.ops.convert_to_numpy(keras.ops.copy(v))) for v in model.weights]


class Recorder(callbacks.Callback):
    """Records the training weights after each step, and the weights seen at other times."""

    def __init__(self):
        super().__init__()
        self.after_steps, self.validated, self.at_epoch_ends, self.at_begins = [], [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.after_steps.append(weights(self.model))

    def on_test_begin(self, logs=None):
        self.validated.append(weights(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch_ends.append(weights(self.model))

    def on_epoch_begin(self, epoch, logs=None):
        self.at_begins.append(weights(self.model))

    def mean(self, steps):
        """Return the float64 means of what was recorded after some steps."""
        arrays = zip(*(self.after_steps[k] for k in steps))
        return [np.mean(np.array(a, "float64"), axis=0) for a in arrays]


def fit(model, callbacks, epochs=4, **kwargs):
    settings = {"batch_size": 4, "shuffle": False, "verbose": 0, "validation_batch_size": 8}
    return model.fit(X, Y, epochs=epochs, callbacks=callbacks, **settings, **kwargs)


VALIDATED = {"validation_data": (X, Y)}


def assert_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, **(tolerance or CLOSE))


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def lower_at(epoch):
    return callbacks.LearningRateScheduler(lambda e: 0.05 if e < epoch else 0.02)


# ---------------------------------------------------------------- what is averaged, and when


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        pytest.param({"start": 0}, [1, 3, 5, 7], marks=pytest.mark.slow),
        ({"start": 2}, [5, 7]),
        pytest.param({"start": 1, "frequency": 2}, [5], marks=pytest.mark.slow),
        pytest.param({"start": 1, "unit": "step"}, [2, 3, 4, 5, 6, 7], marks=pytest.mark.slow),
        ({"start": 1, "unit": "step", "frequency": 3}, [4, 7]),
        pytest.param({}, [5, 7], marks=pytest.mark.slow),
        pytest.param({"unit": "step", "frequency": 2}, [5, 7], marks=pytest.mark.slow),
    ],
)
def test_mean_is_that_of_numpy(settings, taken):
    model, recorder = compiled(), Recorder()
    fit(model, [lower_at(2), recorder, WeightAveraging(**settings)])
    expected = recorder.mean(taken)
    assert_close(weights(model), expected)
    assert np.abs(expected[0] - recorder.after_steps[-1][0]).max() > 1e-3


def test_training_is_that_without_averaging_to_the_bit():
    runs = []
    for averaging in ([], [WeightAveraging(0)]):
        keras.utils.set_random_seed(0)
        recorder = Recorder()
        fit(compiled(), [recorder, *averaging], 3, **VALIDATED)
        runs.append(recorder.after_steps)
    for one, other in zip(*runs, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("validation", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_mean_is_in_place_from_the_end_of_an_epoch_to_the_next(first, validation):
    model, recorder = compiled(), Recorder()
    averaging = WeightAveraging(1)
    order = [averaging, recorder] if first else [recorder, averaging]
    fit(model, order, 3, **(VALIDATED if validation else {}))
    means = [recorder.mean([1]), recorder.mean([3]), recorder.mean([3, 5])]
    for epoch, mean in enumerate(means):
        assert_close(recorder.at_epoch_ends[epoch], mean)
        if validation:
            assert_close(recorder.validated[epoch], mean)
    assert_equal(recorder.at_begins[1], recorder.after_steps[1])
    assert_equal(recorder.at_begins[2], recorder.after_steps[3])


def test_frozen_layers_and_seeds_are_those_of_training():
    model, recorder = compiled(net(frozen=True)), Recorder()
    fit(model, [WeightAveraging(0), recorder])
    last = recorder.after_steps[-1]
    for variable, value, trained in zip(model.weights, weights(model), last):
        if "first" in variable.path or value.dtype.kind != "f":
            np.testing.assert_array_equal(value, trained)
    assert_close(weights(model), recorder.mean([1, 3, 5, 7]))


@pytest.mark.parametrize("reestimate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_statistics_of_the_mean(reestimate):
    model, recorder, data = compiled(), Recorder(), X if reestimate else None
    fit(model, [recorder, WeightAveraging(0, reestimate_with=data)], **VALIDATED)
    mean = recorder.mean([1, 3, 5, 7])
    kernel, bias, _, _, moving_mean, moving_variance = mean[:6]
    if reestimate:
        hidden = np.tanh(X @ kernel + bias)
        moving_mean, moving_variance = hidden.mean(axis=0), hidden.var(axis=0)
    found = weights(model)
    np.testing.assert_allclose(found[4], moving_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[5], moving_variance, rtol=1e-5, atol=1e-6)
    assert_close(recorder.validated[-1], found)


@pytest.mark.slow
def test_statistics_are_reestimated_once_for_a_mean(monkeypatch):
    from keras_infomcr.callbacks import weight_averaging

    calls, function = [], weight_averaging.reestimate_batch_norm

    def counting(*args):
        calls.append(1)
        function(*args)

    monkeypatch.setattr(weight_averaging, "reestimate_batch_norm", counting)
    fit(compiled(), [WeightAveraging(1, frequency=2, reestimate_with=X)], 6, **VALIDATED)
    assert len(calls) == 2


# ---------------------------------------------------------------- other callbacks


def positions(count=2):
    first = pytest.param(0, marks=pytest.mark.slow)
    return pytest.mark.parametrize("position", [first, *range(1, count)])


def inserted(others, position, averaging):
    return [*others[:position], averaging, *others[position:]]


@positions()
@pytest.mark.parametrize(
    "name", [pytest.param("{epoch}.keras", marks=pytest.mark.slow), "{epoch}.weights.h5"]
)
def test_model_checkpoint_saves_the_mean(name, position, tmp_path):
    model, recorder = compiled(), Recorder()
    checkpoint = callbacks.ModelCheckpoint(
        str(tmp_path / name), save_weights_only="weights" in name
    )
    others = [checkpoint]
    fit(model, [*inserted(others, position, WeightAveraging(1)), recorder], 3)
    for epoch, taken in enumerate([[1], [3], [3, 5]]):
        path = tmp_path / name.format(epoch=epoch + 1)
        plain = net()  # which knows nothing of the record
        plain.load_weights(path)
        assert_close(weights(plain)[:-1], recorder.mean(taken)[:-1])


@positions()
def test_early_stopping_restores_the_best_mean(position):
    model, recorder = compiled(), Recorder()
    stopping = callbacks.EarlyStopping("val_loss", mode="max", restore_best_weights=True)
    averaging = WeightAveraging(0)
    history = fit(model, [*inserted([stopping], position, averaging), recorder], 4, **VALIDATED)
    best = int(np.argmax(history.history["val_loss"]))
    assert_equal(weights(model), recorder.validated[best])
    losses = model.evaluate(X, Y, verbose=0), history.history["val_loss"][best]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_optimizer_with_an_exponential_mean():
    model, recorder = compiled(optimizer=keras.optimizers.SGD(0.05, use_ema=True)), Recorder()
    fit(model, [WeightAveraging(0), recorder])
    assert_close(weights(model), recorder.mean([1, 3, 5, 7]))


@pytest.mark.parametrize(
    "other",
    [
        callbacks.SwapEMAWeights(),
        callbacks.ModelCheckpoint("x.keras", save_freq=3),
        WeightAveraging(),
    ],
)
def test_what_cannot_work_together(other):
    with pytest.raises(ValueError, match="must be the only callback that puts averaged weights"):
        fit(compiled(), [other, WeightAveraging(0)])


@pytest.mark.slow
def test_csv_logger_and_history_hold_the_losses_of_the_mean(tmp_path):
    model = compiled()
    history = fit(
        model, [callbacks.CSVLogger(tmp_path / "log.csv"), WeightAveraging(0)], **VALIDATED
    )
    rows = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    np.testing.assert_allclose(rows["val_loss"], history.history["val_loss"], rtol=1e-6)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(rows["val_loss"][-1], rel=1e-6)


# ---------------------------------------------------------------- resuming


class Interruption(Exception):
    pass


def interrupt(hook, epoch):
    def raise_at(e, logs=None):
        if e == epoch:
            raise Interruption

    return callbacks.LambdaCallback(**{hook: raise_at})


def plain():
    return compiled(net(dropout=0))  # Keras's files do not hold the seeds of dropout


def regularized():
    rule = SubBatchPerturbation(num_sub_batches=2, beta=1.0)
    return compiled(RegularizedModel.from_model(net(dropout=0)), regularizer=rule)


@pytest.mark.parametrize(
    ("make", "settings", "until", "position"),
    [
        pytest.param(plain, {"reestimate_with": X}, 1, 0, marks=pytest.mark.slow),
        pytest.param(plain, {}, 3, 1, marks=pytest.mark.slow),
        pytest.param(plain, {}, 3, 0, marks=pytest.mark.slow),
        pytest.param(
            plain,
            {"start": 1, "unit": "step", "frequency": 3},
            2,
            1,
            marks=pytest.mark.slow,
        ),
        pytest.param(regularized, {}, 3, 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_with_the_same_mean(make, settings, until, position, tmp_path):
    def run(directory, *others):
        keras.utils.set_random_seed(0)
        model = make()
        backup = callbacks.BackupAndRestore(directory)
        fit(model, [*inserted([backup], position, WeightAveraging(**settings)), *others], 5)
        return model

    whole = run(tmp_path / "whole", lower_at(2))
    with pytest.raises(Interruption):
        run(tmp_path / "cut", lower_at(2), interrupt("on_epoch_begin", until))
    resumed = run(tmp_path / "cut", lower_at(2))
    assert_equal(weights(resumed), weights(whole))


def test_resumes_after_a_drop_that_came_before(tmp_path):
    """A new process sees the lowered rate alone: the peak comes from the file."""
    recorder = Recorder()
    for until in (3, 9):
        model = compiled()
        backup = callbacks.BackupAndRestore(tmp_path)
        plateau = callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=2, min_delta=1e6)
        others = [plateau, backup, recorder, interrupt("on_epoch_begin", until)]
        try:
            fit(model, [*others, WeightAveraging()], 5)
        except Interruption:
            pass
    assert len(recorder.after_steps) == 5 * STEPS
    assert_close(weights(model), recorder.mean([7, 9]))


@pytest.mark.slow
def test_wrapped_model_is_resumed(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = layers.Dense(1)

        def call(self, inputs):
            return self.out(inputs)

    recorder = Recorder()
    for until in (2, 9):
        inner = Net()
        inner(X)
        model = compiled(RegularizedModel.from_model(inner), regularizer=None)
        others = [callbacks.BackupAndRestore(tmp_path), interrupt("on_epoch_begin", until)]
        try:
            fit(model, [*others, recorder, WeightAveraging(1)])
        except Interruption:
            pass
    assert_close(weights(model), recorder.mean([3, 5, 7]))


def test_interrupted_validation_leaves_training_weights_for_the_next_fit():
    model, recorder = compiled(), Recorder()
    stop = callbacks.LambdaCallback()
    stop.on_test_end = lambda logs=None: (_ for _ in ()).throw(Interruption)
    with pytest.raises(Interruption):
        fit(model, [WeightAveraging(0), recorder, stop], **VALIDATED)
    fit(model, [WeightAveraging(0), recorder], initial_epoch=1, epochs=2)
    assert_equal(recorder.at_begins[1], recorder.after_steps[1])
    assert_close(weights(model), recorder.mean([1, 3]))


def test_a_second_fit_begins_a_new_mean():
    model, recorder = compiled(), Recorder()
    averaging = WeightAveraging(0)
    fit(model, [averaging, recorder], 2)
    fit(model, [averaging, recorder], 2)
    assert_close(weights(model), recorder.mean([5, 7]))


@pytest.mark.slow
def test_files_after_training_hold_no_second_copy(tmp_path):
    model = compiled()
    fit(model, [WeightAveraging(0)])
    model.save_weights(tmp_path / "averaged.weights.h5")
    plain = compiled()
    fit(plain, [])
    plain.save_weights(tmp_path / "plain.weights.h5")
    sizes = [(tmp_path / f"{n}.weights.h5").stat().st_size for n in ("averaged", "plain")]
    assert sizes[0] - sizes[1] < 2048  # an empty group, and a peak


# ---------------------------------------------------------------- special weights and devices


def test_weights_that_are_not_finite_are_left_out():
    model, recorder = compiled(), Recorder()

    def poison(epoch):
        if epoch == 2:
            model.layers[0].kernel.assign(np.full((3, 4), np.nan))

    spoil = callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: poison(epoch))
    with pytest.warns(UserWarning, match="hold NaN or infinity, and are left out") as warned:
        fit(model, [WeightAveraging(0), recorder, spoil, callbacks.TerminateOnNaN()], 5)
    assert len([w for w in warned if "left out" in str(w.message)]) == 1
    assert_close(weights(model), recorder.mean([1, 3]))


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "bfloat16"]
)
def test_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    model, recorder = compiled(net()), Recorder()
    fit(model, [WeightAveraging(0), recorder])
    # The mean is in float32, and rounded when it is assigned: half a unit in the last of 8 bits.
    eps = 2.0**-8 if policy == "bfloat16" else 1e-6
    for found, expected in zip(weights(model), recorder.mean([1, 3, 5, 7])):
        if found.dtype.kind not in "iu":
            np.testing.assert_allclose(found.astype("float64"), expected, rtol=eps, atol=1e-7)


@pytest.mark.slow
def test_compiled_step_with_several_steps_per_execution():
    if BACKEND == "torch":
        pytest.skip("Keras takes no `steps_per_execution` on torch.")
    model, recorder = net(), Recorder()
    model.compile(keras.optimizers.SGD(0.05), "mse", steps_per_execution=2)
    fit(model, [WeightAveraging(1, unit="step", frequency=2), recorder], 3)
    assert_close(weights(model), recorder.mean([1, 2]))


@pytest.mark.slow
def test_replicas_hold_the_mean(mirrored):
    with mirrored.scope():
        model = net()
        model.compile(keras.optimizers.SGD(0.05), "mse")
    recorder = Recorder()
    fit(model, [recorder, WeightAveraging(1, reestimate_with=X)], 3)
    expected = recorder.mean([3, 5])
    for variable in model.trainable_variables:
        for copy in mirrored.experimental_local_results(variable.value):
            index = next(i for i, v in enumerate(model.weights) if v is variable)
            np.testing.assert_allclose(copy.numpy(), expected[index], **CLOSE)
    hidden = np.tanh(X @ expected[0] + expected[1])
    np.testing.assert_allclose(weights(model)[4], hidden.mean(axis=0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- messages


def test_says_that_it_never_started():
    with pytest.warns(UserWarning, match="No weights were averaged: the learning rate did not"):
        fit(compiled(), [WeightAveraging()], 2)
    with pytest.warns(UserWarning, match="no epoch from start=7 on has come"):
        fit(compiled(), [WeightAveraging(7)], 2)


def test_says_when_it_starts_and_ends(capsys):
    fit(compiled(), [lower_at(1), WeightAveraging(verbose=1)], 3)
    printed = capsys.readouterr().out
    assert "Epoch 2: averaging of weights starts: the learning rate, 0.02, has fallen" in printed
    assert "The model holds the mean of 2 weights." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "late"}, "`start` must be \"lr_drop\" or an integer .* Received: start='late'"),
        ({"start": -1}, "`start` must be .* Received: start=-1"),
        ({"start": True}, "`start` must be .* Received: start=True"),
        ({"start": 0.5}, "`start` must be .* Received: start=0.5"),
        ({"frequency": 0}, "`frequency` must be an integer of at least 1. Received: frequency=0"),
        ({"unit": "batch"}, "`unit` must be one of 'epoch', 'step'. Received: unit='batch'"),
        ({"verbose": 2}, "`verbose` must be one of 0, 1. Received: verbose=2"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightAveraging(**arguments)


def test_data_are_checked_when_training_begins():
    with pytest.raises(ValueError, match="`x` must be finite"):
        fit(compiled(), [WeightAveraging(5, reestimate_with=X * np.nan)])
