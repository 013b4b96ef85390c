"""The strength of the regulariser as a function of the epoch or of the step."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import layers
from keras.optimizers import schedules

from keras_infomcr import RegularizedModel
from keras_infomcr.callbacks import RegularizationSchedule
from keras_infomcr.regularizers import SharpnessAware, SubBatchPerturbation, WeightNoise

X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 1)).astype("float32")
STEPS = 2  # an epoch


class Counting(layers.Layer):
    """Count how often the model is traced."""

    calls = 0

    def call(self, inputs):
        Counting.calls += 1
        return inputs


def compiled(beta=10.0, optimizer="sgd", **kwargs):
    inputs = keras.Input((3,))
    model = RegularizedModel(inputs, layers.Dense(1)(Counting()(inputs)))
    kwargs = {"run_eagerly": True, "regularizer": SubBatchPerturbation(0.1, beta, 2), **kwargs}
    model.compile(optimizer, "mse", **kwargs)
    return model


class Note(keras.callbacks.Callback):
    """List the strength that each batch had."""

    def __init__(self):
        super().__init__()
        self.strengths = []

    def on_train_batch_end(self, batch, logs=None):
        self.strengths.append(float(self.model.regularizer.strength))


def fit(model, schedule, epochs=3, **kwargs):
    """Return the strength in each step."""
    note = Note()
    callbacks = [note, *([schedule] if schedule else [])]
    model.fit(
        X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **kwargs
    )
    return note.strengths


def test_a_function_of_the_epoch():
    strengths = fit(compiled(), RegularizationSchedule(lambda epoch: 2.0 * epoch))
    assert strengths == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0]


def test_epochs_count_from_initial_epoch():
    schedule = RegularizationSchedule([5.0, 6.0, 7.0].__getitem__)
    assert fit(compiled(), schedule, initial_epoch=1) == [6.0, 6.0, 7.0, 7.0]


@pytest.mark.parametrize("number", [int, np.float32, np.float64, keras.ops.convert_to_tensor])
def test_a_function_may_return_any_number(number):
    schedule = RegularizationSchedule(lambda epoch: number(3))
    assert fit(compiled(), schedule, epochs=1) == [3.0] * STEPS


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "loss scale"])
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.PiecewiseConstantDecay([2], [1.0, 5.0]),
        pytest.param(
            schedules.CosineDecay(0.0, decay_steps=3, warmup_target=40.0, warmup_steps=2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_schedule_over_steps(schedule, optimizer):
    if optimizer == "loss scale":
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    strengths = fit(compiled(optimizer=optimizer), RegularizationSchedule(schedule))
    assert strengths == [float(schedule(step)) for step in range(3 * STEPS)]
    assert len(set(strengths)) > 1


def test_a_schedule_goes_on_in_a_second_fit():
    schedule = schedules.PolynomialDecay(1.0, decay_steps=8, end_learning_rate=0.0)
    model, callback = compiled(), RegularizationSchedule(schedule)
    strengths = fit(model, callback, epochs=1) + fit(model, callback, epochs=2, initial_epoch=1)
    assert strengths == [1.0, 0.875, 0.75, 0.625]


@pytest.mark.slow
@pytest.mark.parametrize("by_step", [False, True])
def test_it_acts_on_training(by_step):
    """A schedule trains as a strength that is set by hand does, and nothing is traced again."""
    values = [0.0, 8.0, 2.0]
    schedule = schedules.PiecewiseConstantDecay([1, 3], values) if by_step else values.__getitem__
    keras.utils.set_random_seed(0)
    scheduled = compiled(run_eagerly=False)
    by_hand = compiled(run_eagerly=False)
    by_hand.set_weights(scheduled.get_weights())

    Counting.calls = 0
    fit(scheduled, RegularizationSchedule(schedule), epochs=1)
    calls = Counting.calls
    fit(scheduled, RegularizationSchedule(schedule), initial_epoch=1)
    assert (Counting.calls == calls > 0) or BACKEND == "torch"  # where nothing is traced
    for epoch, value in enumerate(values):
        by_hand.regularizer.beta = value
        fit(by_hand, None, epochs=epoch + 1, initial_epoch=epoch)
    for a, b in zip(scheduled.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_verbose_prints_a_line_an_epoch(capsys):
    fit(compiled(), RegularizationSchedule(lambda epoch: 0.5 + epoch, verbose=1), epochs=2)
    assert capsys.readouterr().out == (
        "Epoch 1: strength of the regulariser is 0.5.\n"
        "Epoch 2: strength of the regulariser is 1.5.\n"
    )


def test_quiet_by_default(capsys):
    fit(compiled(), RegularizationSchedule(lambda epoch: 1.0), epochs=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rule", "parameter"),
    [
        pytest.param(SharpnessAware, "rho", marks=pytest.mark.slow),
        (SubBatchPerturbation, "beta"),
        (WeightNoise, "std"),
        pytest.param(WeightNoise, "strength", marks=pytest.mark.slow),
    ],
)
def test_another_name_of_a_live_parameter(rule, parameter, capsys):
    model = compiled(regularizer=rule(num_sub_batches=2) if parameter == "beta" else rule())
    schedule = RegularizationSchedule(lambda epoch: 0.5 + epoch, parameter, verbose=1)
    fit(model, schedule, epochs=2)
    assert float(getattr(model.regularizer, parameter)) == 1.5
    assert f"Epoch 2: {parameter} of the regulariser is 1.5.\n" in capsys.readouterr().out


@pytest.mark.parametrize("parameter", ["rho", "alpha", "memory", None])
def test_a_parameter_that_is_not_live(parameter):
    message = r"`parameter` must be .* Received: parameter=.*SubBatch.* has \['beta', 'strength'\]"
    with pytest.raises(ValueError, match=message):
        fit(compiled(), RegularizationSchedule(lambda epoch: 1.0, parameter))


@pytest.mark.parametrize("schedule", [10.0, None, "cosine", {0: 1.0}])
def test_a_schedule_must_be_callable(schedule):
    with pytest.raises(TypeError, match=r"`schedule` must be a function .* Received: schedule="):
        RegularizationSchedule(schedule)


def test_verbose_must_be_0_or_1():
    with pytest.raises(ValueError, match=r"`verbose` must be one of 0, 1\. Received: verbose=3"):
        RegularizationSchedule(lambda epoch: 1.0, verbose=3)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("by_step", [False, True])
def test_a_strength_out_of_range(strength, by_step):
    constant = schedules.PiecewiseConstantDecay([100], [strength, strength])
    model = compiled(3.0)
    before = model.get_weights()
    message = r"`strength` must be a finite number, 0 or greater\. Received: strength="
    with pytest.raises(ValueError, match=message):
        fit(model, RegularizationSchedule(constant if by_step else lambda epoch: strength))
    assert float(model.regularizer.strength) == 3.0
    np.testing.assert_array_equal(before[0], model.get_weights()[0])


@pytest.mark.parametrize("strength", [None, "10", [1.0, 2.0]])
def test_a_strength_that_is_no_number(strength):
    with pytest.raises((TypeError, ValueError), match=r"`strength` must be .* Received: strength="):
        fit(compiled(), RegularizationSchedule(lambda epoch: strength))


@pytest.mark.parametrize("kind", ["plain", "no regulariser"])
def test_models_without_a_regularizer_are_refused(kind):
    if kind == "plain":
        model = keras.Sequential([layers.Dense(1)])
        model.compile("sgd", "mse")
    else:
        model = compiled(regularizer=None)
    message = "`RegularizationSchedule` needs a `RegularizedModel` compiled with a regulariser"
    with pytest.raises(ValueError, match=message):
        fit(model, RegularizationSchedule(lambda epoch: 1.0))
