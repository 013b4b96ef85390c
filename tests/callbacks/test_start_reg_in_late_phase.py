"""The regulariser acts in the last part of the epochs, in resumed runs too."""

import keras
import numpy as np
import pytest
from learning_rate_drops import (
    ACTIVE,
    RATES,
    STEPS,
    X,
    Y,
    assert_opened_at,
    compiled,
    fit,
    functional,
    plain_model,
)

from keras_infomcr.callbacks import StartRegInLatePhase
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("nothing_recorded")


@pytest.mark.parametrize(
    ("epochs", "fraction", "first"),
    [
        pytest.param(10, 0.3, 7, marks=pytest.mark.slow),
        pytest.param(10, 0.25, 8, marks=pytest.mark.slow),  # 2.5 epochs round to the even number
        (3, 0.3, 2),  # 0.9
        pytest.param(4, 0.3, 3, marks=pytest.mark.slow),  # 1.2
        (2, 0.01, 1),  # at least one
        (2, 1.0, 0),
        (1, 0.3, 0),
    ],
)
def test_acts_in_the_last_epochs(epochs, fraction, first):
    fit(compiled(0.1), [StartRegInLatePhase(fraction)], epochs)
    assert len(RATES) == epochs * STEPS
    assert_opened_at(first * STEPS)


@pytest.mark.parametrize(
    "mode",
    [{}, pytest.param({"run_eagerly": True}, marks=pytest.mark.slow)],
    ids=["compiled", "eager"],
)
def test_trains_as_plain_keras_until_then(mode):
    """The weights after each epoch equal plain Keras's before the gate opens, and differ after."""

    def weights_by_epoch(regularizer, callbacks):
        keras.utils.set_random_seed(0)
        model, seen = functional(), []
        model.compile(keras.optimizers.SGD(0.01), "mse", regularizer=regularizer, **mode)
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()[0])
        )
        fit(model, [*callbacks, note], epochs=4)
        return seen

    rule = SubBatchPerturbation(0.1, 5.0, num_sub_batches=2)
    weights = weights_by_epoch(None, []), weights_by_epoch(rule, [StartRegInLatePhase(0.5)])
    equal = [np.array_equal(a, b) for a, b in zip(*weights, strict=True)]
    assert equal == [True, True, False, False]


@pytest.mark.parametrize(("initial_epoch", "first"), [(1, 3), (3, 3), (4, 4)])
def test_counts_epochs_from_the_beginning_of_the_run(initial_epoch, first):
    model = compiled(0.1)
    fit(model, [StartRegInLatePhase(0.5)], epochs=6, initial_epoch=initial_epoch)
    assert_opened_at((first - initial_epoch) * STEPS)


class Interruption(Exception):
    pass


@pytest.mark.parametrize("backup_first", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("epoch", [1, 3])
def test_resumes_with_backup_and_restore(epoch, backup_first, tmp_path):
    def interrupt(epoch_now, logs):
        if epoch_now == epoch:
            raise Interruption

    def run(*others):
        callbacks = [keras.callbacks.BackupAndRestore(tmp_path), StartRegInLatePhase(0.5)]
        fit(compiled(0.1), [*(callbacks if backup_first else callbacks[::-1]), *others], epochs=4)

    with pytest.raises(Interruption):
        run(keras.callbacks.LambdaCallback(on_epoch_begin=interrupt))
    assert len(RATES) == epoch * STEPS
    run()
    assert len(RATES) == 4 * STEPS
    assert_opened_at(2 * STEPS)


def test_closes_the_gate_again_in_the_next_fit():
    model, callback = compiled(0.1), StartRegInLatePhase(0.5)
    fit(model, [callback], epochs=2)
    fit(model, [callback], epochs=6, initial_epoch=2)
    first, second = [1], [3, 4, 5]  # the epochs in which it acts
    assert ACTIVE == [STEPS * epoch + k for epoch in first + second for k in range(STEPS)]


@pytest.mark.parametrize("active", [True, False])
def test_leaves_the_gate_where_no_epoch_is_left(active):
    model = compiled(0.1)
    model.regularizer_active = active
    fit(model, [StartRegInLatePhase()], epochs=2, initial_epoch=2)
    assert model.regularizer_active is active and ACTIVE == []


def test_warns_where_training_ends_before():
    model = compiled(0.1)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    message = r"never started: training ended before epoch 8 of 10\. Received: last_fraction=0\.3"
    with pytest.warns(UserWarning, match=message):
        fit(model, [StartRegInLatePhase(), stop], epochs=10)


def test_verbose_prints_one_line(capsys):
    fit(compiled(0.1), [StartRegInLatePhase(0.5, verbose=1)], epochs=4)
    message = "Epoch 3: the regulariser starts. These are the last 2 of 4 epochs.\n"
    assert capsys.readouterr().out == message
    fit(compiled(0.1), [StartRegInLatePhase(0.5)], epochs=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"last_fraction": 0}, r"`last_fraction` must be a number in \(0, 1\]\. Received: last_f"),
        ({"last_fraction": 30}, r"`last_fraction` must be .* Received: last_fraction=30"),
        ({"last_fraction": "0.3"}, r"`last_fraction` must be .* Received: last_fraction='0\.3'"),
        ({"verbose": 2}, r"`verbose` must be one of 0, 1\. Received: verbose=2"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        StartRegInLatePhase(**argument)


def test_models_without_a_regularizer_are_refused():
    model = plain_model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`StartRegInLatePhase` needs a `RegularizedModel` compil"):
        model.fit(X, Y, callbacks=[StartRegInLatePhase()], verbose=0)
