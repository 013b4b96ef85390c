"""The gate of a run that was interrupted opens at the step at which it would have opened."""

import keras
import numpy as np
import pytest
from keras.optimizers import schedules
from learning_rate_drops import (
    ACTIVE,
    MECHANISMS,
    NEVER,
    RATES,
    STEPS,
    Net,
    RecordingSGD,
    Spy,
    X,
    assert_opened_at,
    compiled,
    first_drop,
    fit,
    functional,
    plain_model,
    plateau,
    scheduler,
    wrapped,
)
from parameters import slow_but

from keras_infomcr import StartRegAfterLRDrop

pytestmark = pytest.mark.usefixtures("nothing_recorded")


class Interruption(Exception):
    pass


class InterruptBefore(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Interruption


RESUMABLE = [
    "ReduceLROnPlateau",
    "LearningRateScheduler, begins lower",
    "PiecewiseConstantDecay",
    "CosineDecay with warm-up",
]


def prepared(mechanism, make=functional):
    """Return a fresh model and fresh callbacks, as a new process has them."""
    optimizer, callback, _ = MECHANISMS[mechanism]
    return compiled(None, make, optimizer()), [callback()] if callback else []


def run(mechanism, directory, until=None, order=(0, 1, 2), make=functional, epochs=4):
    """Begin or resume a run as a new process would; interrupt it before the epoch `until`."""
    model, callbacks = prepared(mechanism, make)
    callbacks += [keras.callbacks.BackupAndRestore(directory), StartRegAfterLRDrop()]
    callbacks = [callbacks[i] for i in order if i < len(callbacks)]
    try:
        fit(model, [*callbacks, InterruptBefore(until)], epochs)
    except Interruption:
        assert until is not None


@pytest.mark.parametrize(
    "order", [pytest.param((0, 1, 2), marks=pytest.mark.slow), (2, 1, 0)], ids=str
)
@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "mechanism", slow_but(RESUMABLE, "ReduceLROnPlateau", "PiecewiseConstantDecay")
)
def test_resumes_with_backup_and_restore(mechanism, epoch, order, tmp_path):
    run(mechanism, tmp_path, epoch, order)
    assert len(RATES) == epoch * STEPS
    run(mechanism, tmp_path, None, order)
    assert len(RATES) == 4 * STEPS
    assert_opened_at(first_drop())


@pytest.mark.parametrize(
    "epoch", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_resumes_where_the_backup_is_made_before_the_drop_of_its_epoch(epoch, tmp_path):
    run("ReduceLROnPlateau", tmp_path, epoch, order=(1, 0, 2))
    run("ReduceLROnPlateau", tmp_path, order=(1, 0, 2), epochs=5)
    assert_opened_at(first_drop())


def test_resumes_with_a_loss_scale_optimizer(tmp_path):
    run("LossScaleOptimizer, ReduceLROnPlateau", tmp_path, 3)
    run("LossScaleOptimizer, ReduceLROnPlateau", tmp_path)
    assert_opened_at(first_drop())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_resumes_in_mid_epoch(steps, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if len(RATES) == steps:
                raise Interruption

    for interrupt in ([Interrupt()], []):
        model, _ = prepared("PiecewiseConstantDecay")
        backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq=1)
        try:
            fit(model, [backup, StartRegAfterLRDrop(), *interrupt])
        except Interruption:
            assert len(RATES) == steps
    assert_opened_at(3)


@pytest.mark.parametrize(
    "mechanism",
    ["ReduceLROnPlateau", pytest.param("PiecewiseConstantDecay", marks=pytest.mark.slow)],
)
def test_resumes_twice(mechanism, tmp_path):
    for epoch in (1, 3, 4, None):
        run(mechanism, tmp_path, epoch, epochs=5)
    assert_opened_at(first_drop())


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("mechanism", ["ReduceLROnPlateau", "PiecewiseConstantDecay"])
def test_resumes_a_wrapped_model(mechanism, epoch, tmp_path):
    run(mechanism, tmp_path, epoch, make=wrapped)
    run(mechanism, tmp_path, make=wrapped)
    assert_opened_at(first_drop())


@pytest.mark.parametrize("make", [functional, pytest.param(wrapped, marks=pytest.mark.slow)])
@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "mechanism", slow_but(["ReduceLROnPlateau", "CosineDecay with warm-up"], "ReduceLROnPlateau")
)
def test_resumes_from_a_file(mechanism, epoch, make, tmp_path):
    model, callbacks = prepared(mechanism, make)
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    fit(model, [*callbacks, StartRegAfterLRDrop(), checkpoint])
    del RATES[epoch * STEPS :]
    ACTIVE[:] = [step for step in ACTIVE if step < len(RATES)]
    model = keras.saving.load_model(tmp_path / f"{epoch}.keras")
    _, callbacks = prepared(mechanism)
    fit(model, [*callbacks, StartRegAfterLRDrop()], initial_epoch=epoch)
    assert_opened_at(first_drop())


@pytest.mark.parametrize("mechanism", ["PiecewiseConstantDecay", "CosineDecay with warm-up"])
def test_resumes_the_file_of_a_plain_model(mechanism, tmp_path):
    plain = plain_model()
    plain.compile(MECHANISMS[mechanism][0](), "mse", run_eagerly=True)
    fit(plain, [], epochs=2)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model, callbacks = prepared(mechanism)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "plain.weights.h5")
    fit(model, [*callbacks, StartRegAfterLRDrop()], epochs=3, initial_epoch=2)
    assert_opened_at(2 * STEPS)


def test_resumes_the_file_of_a_plain_model_with_gradient_accumulation(tmp_path):
    """A schedule counts batches, while `iterations` counts updates of several batches each."""
    rate = schedules.PiecewiseConstantDecay([1, 3], [0.01, 0.1, 0.05])
    plain = plain_model()
    plain.compile(keras.optimizers.SGD(rate, gradient_accumulation_steps=2), "mse")
    fit(plain, [], epochs=2)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = compiled(None, optimizer=RecordingSGD(rate, gradient_accumulation_steps=2))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "plain.weights.h5")
    fit(model, [StartRegAfterLRDrop()], epochs=3, initial_epoch=2)
    assert len(ACTIVE) == STEPS


def test_weights_of_another_run_are_no_resumption(tmp_path):
    """A file without the optimizer's state tells nothing of the rates of the run that wrote it."""
    model = compiled(None, optimizer=RecordingSGD(1.0, momentum=0.9))
    fit(model, [plateau(), StartRegAfterLRDrop()])
    model.save_weights(tmp_path / "model.weights.h5")
    RATES.clear(), ACTIVE.clear()
    model = compiled(None, optimizer=RecordingSGD(0.1, momentum=0.9))
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        model.load_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match=NEVER):
        fit(model, [StartRegAfterLRDrop()], epochs=2)
    assert ACTIVE == []


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("make", [functional, pytest.param(wrapped, marks=pytest.mark.slow)])
def test_a_file_that_remembers_the_peak_is_still_one_of_plain_keras(make, sharded, tmp_path):
    model = compiled(0.1, make)
    fit(model, [scheduler(), StartRegAfterLRDrop()], epochs=3)
    path = tmp_path / ("model.weights.json" if sharded else "model.weights.h5")
    model.save_weights(path, **({"max_shard_size": 1} if sharded else {}))
    plain = plain_model() if make is functional else Net()
    plain(X)
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    plain.optimizer.build(plain.trainable_variables)
    plain.load_weights(path)
    np.testing.assert_array_equal(plain.get_weights()[0], model.get_weights()[0])
    assert int(plain.optimizer.iterations) == 3 * STEPS
    again = compiled(0.1, make)
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    del ACTIVE[:]
    fit(again, [StartRegAfterLRDrop()], initial_epoch=3)
    assert len(ACTIVE) == STEPS


@pytest.mark.parametrize("epochs", slow_but([1, 3], 3))
@pytest.mark.parametrize("mechanism", ["ReduceLROnPlateau", "PiecewiseConstantDecay"])
def test_a_second_fit_continues(mechanism, epochs):
    model, callbacks = prepared(mechanism)
    start = StartRegAfterLRDrop(start_epoch=100)
    if epochs == 1:
        with pytest.warns(UserWarning, match="never started"):
            fit(model, [*callbacks, start], epochs=1)
    else:
        fit(model, [*callbacks, start], epochs=3)
        assert model.regularizer_active
    fit(model, [*callbacks, start], initial_epoch=epochs)
    assert_opened_at(first_drop())


def test_closes_the_gate_when_training_begins():
    model = compiled(0.1)
    model.regularizer_active = True
    with pytest.warns(UserWarning, match=NEVER):
        fit(model, [StartRegAfterLRDrop()], epochs=1)
    assert ACTIVE == []


def test_compiling_anew_forgets_the_peak():
    model = compiled(0.1)
    fit(model, [scheduler(), StartRegAfterLRDrop()])
    model.compile(RecordingSGD(0.01), "mse", run_eagerly=True, regularizer=Spy())
    RATES.clear(), ACTIVE.clear()
    with pytest.warns(UserWarning, match=NEVER):
        fit(model, [StartRegAfterLRDrop()], epochs=1)
    assert ACTIVE == []


def test_one_callback_may_serve_two_models():
    start = StartRegAfterLRDrop()
    for _ in range(2):
        RATES.clear(), ACTIVE.clear()
        fit(compiled(0.1), [scheduler(), start])
        assert_opened_at(4)
