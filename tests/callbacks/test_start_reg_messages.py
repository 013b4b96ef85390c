"""What `StartRegAfterLRDrop` prints, warns of and refuses."""

import re

import keras
import numpy as np
import pytest
from keras import layers
from keras.optimizers import schedules
from learning_rate_drops import (
    NEVER,
    STEPS,
    Spy,
    X,
    Y,
    assert_opened_at,
    compiled,
    fit,
    functional,
    plain_model,
    scheduler,
    wrapped,
)

from keras_infomcr import RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.callbacks import FlatnessCallback, RegularizationSchedule

pytestmark = pytest.mark.usefixtures("nothing_recorded")


def test_verbose_prints_one_line(capsys):
    fit(compiled(0.1), [scheduler(), StartRegAfterLRDrop(verbose=1)])
    out = capsys.readouterr().out
    start = "Epoch 3: the regulariser starts. Learning rate 0.01: "
    assert out == start + "it has fallen below 0.75 of its peak 0.1.\n"


def test_verbose_says_that_the_epoch_has_come(capsys):
    fit(compiled(0.1), [StartRegAfterLRDrop(start_epoch=1, verbose=1)])
    out = capsys.readouterr().out
    start = "Epoch 2: the regulariser starts. Learning rate 0.1: "
    assert out == start + "start_epoch=1 has come, its peak is 0.1.\n"


def test_quiet_by_default(capsys):
    fit(compiled(0.1), [scheduler(), StartRegAfterLRDrop()])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rates", [[0.1, 0.1], [0.01, 0.1]])
def test_warns_at_the_end_if_it_never_opened(rates):
    model = compiled(0.1)
    callback = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
    with pytest.warns(UserWarning, match=NEVER):
        fit(model, [callback, StartRegAfterLRDrop()], epochs=2)
    assert_opened_at(2 * STEPS)
    assert not model.regularizer_active


ALWAYS = r"will never start in this `fit`: the learning rate is constant, .* Received: ratio=0\.75"


def at_constant_rate(
    callbacks, optimizer=lambda: keras.optimizers.SGD(0.1), make=functional, **settings
):
    """Return a model at a constant rate, and a function that trains it for two epochs."""
    model = make()
    model.compile(optimizer(), "mse", run_eagerly=True, regularizer=Spy())
    return model, lambda: fit(model, [*callbacks, StartRegAfterLRDrop(**settings)], epochs=2)


def of_keras(path):
    return [
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.EarlyStopping("loss"),
        keras.callbacks.ModelCheckpoint(path / "model.weights.h5", save_weights_only=True),
        RegularizationSchedule(lambda epoch: 1.0),
        FlatnessCallback((X, Y), ["hessian_trace"]),
    ]


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        (lambda path: [], {}),
        (of_keras, {}),
        (lambda path: [], {"start_epoch": 2}),
        (
            lambda path: [],
            {"optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())},
        ),
        (lambda path: [], {"make": wrapped}),
    ],
    ids=["alone", "beside others", "start_epoch after the end", "LossScaleOptimizer", "wrapped"],
)
def test_says_at_the_beginning_that_nothing_will_open_it(callbacks, settings, tmp_path):
    """The tests turn warnings into errors. This one ends the training before the first step."""
    model, train = at_constant_rate(callbacks(tmp_path), **settings)
    with pytest.raises(UserWarning, match=ALWAYS):
        train()
    assert int(model.optimizer.iterations) == 0


class Idle(keras.callbacks.Callback):
    """A user's callback, of which nobody knows whether it lowers the rate."""


class OwnStep(RegularizedModel):
    """A model whose own step may lower the rate."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1)

    def call(self, inputs):
        return self.out(inputs)

    def train_step(self, *args):
        return super().train_step(*args)


class OwnSGD(keras.optimizers.SGD):
    """A user's optimizer, which may lower its own rate."""


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        pytest.param(
            [keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)], {}, marks=pytest.mark.slow
        ),
        ([keras.callbacks.ReduceLROnPlateau("loss", patience=9)], {}),
        pytest.param([keras.callbacks.LambdaCallback()], {}, marks=pytest.mark.slow),
        ([Idle()], {}),
        ([], {"optimizer": lambda: keras.optimizers.SGD(schedules.CosineDecay(0.1, 1000))}),
        ([], {"optimizer": lambda: OwnSGD(0.1)}),
        ([], {"make": OwnStep}),
    ],
    ids=["scheduler", "plateau", "lambda", "user's", "schedule", "optimizer", "train_step"],
)
def test_says_nothing_at_the_beginning_where_the_rate_may_fall(callbacks, settings):
    _, train = at_constant_rate(callbacks, **settings)
    with pytest.warns(UserWarning, match=NEVER):  # at the end; another one would be an error
        train()


def test_says_it_at_the_beginning_and_at_the_end():
    _, train = at_constant_rate([])
    with pytest.warns(UserWarning) as caught:
        train()
    messages = (str(w.message) for w in caught if w.category is UserWarning)
    first, last = (m for m in messages if m.startswith("The regulariser"))
    assert re.search(ALWAYS, first) and re.search(NEVER, last)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_says_nothing_where_the_epoch_will_come(start_epoch):
    model, train = at_constant_rate([], start_epoch=start_epoch)
    train()
    assert model.regularizer_active


@pytest.mark.parametrize("epochs", [0, 2])
def test_no_warning_where_nothing_was_left_to_train(epochs):
    fit(compiled(0.1), [StartRegAfterLRDrop()], epochs=epochs, initial_epoch=2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"ratio": 0}, r"`ratio` must be a number in \(0, 1\]\. Received: ratio=0"),
        ({"ratio": 1.1}, r"`ratio` must be .* Received: ratio=1\.1"),
        ({"ratio": float("nan")}, r"`ratio` must be .* Received: ratio=nan"),
        ({"ratio": "0.5"}, r"`ratio` must be .* Received: ratio='0\.5'"),
        ({"start_epoch": -1}, r"`start_epoch` must be .* at least 0\. Received: start_epoch=-1"),
        ({"start_epoch": 1.5}, r"`start_epoch` must be an integer.* Received: start_epoch=1\.5"),
        ({"start_epoch": True}, r"`start_epoch` must be an integer.* Received: start_epoch=True"),
        ({"verbose": 2}, r"`verbose` must be one of 0, 1\. Received: verbose=2"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        StartRegAfterLRDrop(**argument)


@pytest.mark.parametrize("kind", ["plain", "no regulariser"])
def test_models_without_a_regularizer_are_refused(kind):
    if kind == "plain":
        model = plain_model()
        model.compile("sgd", "mse")
    else:
        model = compiled(0.1, regularizer=None)
    before = model.get_weights()
    message = "`StartRegAfterLRDrop` needs a `RegularizedModel` compiled with a regulariser"
    with pytest.raises(ValueError, match=message):
        fit(model, [StartRegAfterLRDrop()])
    np.testing.assert_array_equal(before, model.get_weights())
