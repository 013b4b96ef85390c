"""The gate opens before exactly the batch that first uses a lower learning rate."""

import itertools

import keras
import numpy as np
import pytest
from frameworks import only_on
from keras.optimizers import schedules
from learning_rate_drops import (
    MECHANISMS,
    RATES,
    STEPS,
    LowerAtBatch,
    Spy,
    X,
    Y,
    assert_opened_at,
    compiled,
    first_drop,
    fit,
    functional,
    scheduler,
    wrapped,
)

from keras_infomcr import StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("nothing_recorded")


# One mechanism of each kind, in either order; CI tries the others.
FAST = [
    ("ReduceLROnPlateau", True),
    ("LearningRateScheduler, begins lower", False),
    ("PiecewiseConstantDecay", False),
    ("LossScaleOptimizer, ReduceLROnPlateau", False),
    ("set after a batch", False),
]
ORDERS = [
    pytest.param(*case, id="-".join(map(str, case)), marks=[pytest.mark.slow] * (case not in FAST))
    for case in itertools.product(MECHANISMS, (False, True))
]


@pytest.mark.parametrize(("mechanism", "start_first"), ORDERS)
def test_opens_before_the_first_batch_of_the_lower_rate(mechanism, start_first):
    optimizer, callback, step = MECHANISMS[mechanism]
    model = compiled(None, optimizer=optimizer())
    callbacks = [StartRegAfterLRDrop(), *([callback()] if callback else [])]
    fit(model, callbacks if start_first else callbacks[::-1])
    assert len(RATES) == 4 * STEPS
    assert first_drop() == step
    assert_opened_at(step)


def test_opens_at_the_batch_for_which_a_callback_before_it_lowers_the_rate():
    model = compiled(0.1)
    fit(model, [LowerAtBatch(1, "on_train_batch_begin"), StartRegAfterLRDrop()], epochs=1)
    assert first_drop() == 1
    assert_opened_at(1)


def test_stays_open_when_the_rate_rises_again():
    model = compiled(0.1)
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: [0.1, 0.01, 1.0][epoch])
    fit(model, [rates, StartRegAfterLRDrop()], epochs=3)
    assert_opened_at(STEPS)


@pytest.mark.parametrize("factor", [pytest.param(0.1, marks=pytest.mark.slow), 0.2, 0.5])
def test_by_default_the_usual_steps_open_it_at_once(factor):
    model = compiled(0.1)
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 * factor ** (epoch // 2))
    fit(model, [rates, StartRegAfterLRDrop()])
    assert_opened_at(2 * STEPS)


@pytest.mark.parametrize(
    ("rate", "share"),
    [
        # (1 + cos(pi t)) / 2 = 3/4 at t = 1/3; 1 - t at t = 1/4.
        (schedules.CosineDecay(0.1, decay_steps=24), 1 / 3),
        pytest.param(
            schedules.PolynomialDecay(0.1, decay_steps=24, end_learning_rate=0.0),
            1 / 4,
            marks=pytest.mark.slow,
        ),
        # 0.9^2 = 0.81, 0.9^3 = 0.729.
        pytest.param(
            schedules.ExponentialDecay(0.1, 2, 0.9, staircase=True), 6 / 24, marks=pytest.mark.slow
        ),
    ],
    ids=["cosine", "linear", "steps of 0.9"],
)
def test_by_default_smooth_decays_open_it_in_mid_training(rate, share):
    """The gate opens where the rate reaches 0.75 of its peak, after that share of all steps.

    At that very step the rate equals the limit and rounding decides: the next step may be the one.
    """
    model = functional()
    model.compile(keras.optimizers.SGD(rate), "mse", regularizer=Spy())
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(model.regularizer_active)
    )
    fit(model, [StartRegAfterLRDrop(), note], epochs=12)
    assert len(seen) == 24
    assert seen.index(True) - round(24 * share) in (0, 1)
    assert all(seen[seen.index(True) :])


@pytest.mark.parametrize(
    ("ratio", "step"),
    [
        (1.0, 2),
        pytest.param(0.99, 4, marks=pytest.mark.slow),
        pytest.param(0.85, 4, marks=pytest.mark.slow),
        (0.75, 6),
    ],
)
def test_ratio(ratio, step):
    model = compiled(0.1)
    rates = keras.callbacks.LearningRateScheduler(lambda e: [0.1, 0.0995, 0.08, 0.07][e])
    fit(model, [rates, StartRegAfterLRDrop(ratio=ratio)])
    assert first_drop(ratio) == step
    assert_opened_at(step)


@pytest.mark.parametrize(
    ("start_epoch", "step"),
    [
        pytest.param(0, 0, marks=pytest.mark.slow),
        (1, 2),
        pytest.param(2, 4, marks=pytest.mark.slow),
        pytest.param(3, 4, marks=pytest.mark.slow),
        (None, 4),
    ],
)
def test_start_epoch_opens_even_without_a_drop(start_epoch, step):
    fit(compiled(0.1), [scheduler(), StartRegAfterLRDrop(start_epoch=start_epoch)])
    assert_opened_at(step)


def test_start_epoch_counts_from_initial_epoch():
    fit(compiled(0.1), [StartRegAfterLRDrop(start_epoch=2)], initial_epoch=2)
    assert_opened_at(0)


class Note(keras.callbacks.Callback):
    """Note the weights after each batch."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.model.get_weights()[0])


@pytest.mark.parametrize("make", [functional, pytest.param(wrapped, marks=pytest.mark.slow)])
def test_opens_a_compiled_step(make):
    """The weights equal plain Keras's up to the drop, and differ from there on."""
    weights = []
    for regularizer in (None, SubBatchPerturbation(0.1, 5.0, num_sub_batches=2)):
        keras.utils.set_random_seed(0)
        model = make()
        rate = schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
        model.compile(keras.optimizers.SGD(rate), "mse", regularizer=regularizer)
        seen = []
        note = Note(seen)
        start = [] if regularizer is None else [StartRegAfterLRDrop()]
        history = fit(model, [*start, note], epochs=2).history
        weights.append(np.array(seen))
    equal = (weights[0] == weights[1]).all(axis=(1, 2))
    assert equal.tolist() == [True] * 3 + [False]
    assert np.isnan(history["infomcr_reg"][0]) and history["infomcr_reg"][1] > 0


@only_on("tensorflow", "jax", reason="Keras refuses `steps_per_execution` on torch.")
@pytest.mark.parametrize(
    ("boundary", "batch"),
    [
        pytest.param(5, 7, marks=pytest.mark.slow),
        (4, 7),
        pytest.param(3, 5, marks=pytest.mark.slow),
    ],
)
def test_steps_per_execution(boundary, batch):
    """Two steps are executed together, so that the drop is seen before the next two."""
    rate = schedules.PiecewiseConstantDecay([boundary], [0.1, 0.01])
    model = functional()
    model.compile(keras.optimizers.SGD(rate), "mse", steps_per_execution=2, regularizer=Spy())
    seen = {}
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.update({batch: model.regularizer_active})
    )
    x, y = np.repeat(X, 4, axis=0), np.repeat(Y, 4, axis=0)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[StartRegAfterLRDrop(), note])
    assert seen == {end: end >= batch for end in (1, 3, 5, 7)}
