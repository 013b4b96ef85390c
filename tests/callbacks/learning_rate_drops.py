"""Ways in which Keras lowers a learning rate, and a record of what each step used."""

import keras
import numpy as np
from frameworks import BACKEND
from keras import layers
from keras.optimizers import schedules

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import Regularizer, Step

X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 1)).astype("float32")
STEPS = 2  # an epoch
RATES = []  # the learning rate that the optimizer used in each step
ACTIVE = []  # the steps in which the regulariser acted

# The warning of a run in which the gate has stayed closed.
NEVER = r"never started: .* below `ratio` times its peak\. Received: ratio=0\.75, start_epoch=None"
register = keras.saving.register_keras_serializable("tests")


@register
class RecordingSGD(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        note_rate(learning_rate)
        super().update_step(gradient, variable, learning_rate)


def note_rate(rate):
    if BACKEND != "jax":
        RATES.append(float(rate))
        return
    import jax

    # A LossScaleOptimizer traces its step even where all else is eager.
    rate = keras.ops.copy(rate)
    jax.debug.callback(lambda rate: RATES.append(float(rate)), rate, ordered=True)
    jax.effects_barrier()


@register
class Spy(Regularizer):
    """A regulariser that changes nothing and records the steps in which it acts."""

    def __init__(self, strength=1.0):
        super().__init__(strength)

    def __call__(self, objective, batch, memory):
        ACTIVE.append(len(RATES))
        return Step(0.0)

    def get_config(self):
        return {"strength": float(self.strength)}


@register
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.out = layers.Dense(1, use_bias=False)

    def call(self, inputs):
        return self.out(inputs)


def plain_model():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))


def functional():
    return RegularizedModel.from_model(plain_model())


def wrapped():
    model = Net()
    model(X)
    return RegularizedModel.from_model(model)


def compiled(rate, make=functional, optimizer=None, regularizer="spy", **kwargs):
    """Compile a model to run eagerly, so that each step adds to `RATES` and `ACTIVE`."""
    model = make()
    optimizer = optimizer or RecordingSGD(rate)
    regularizer = Spy() if regularizer == "spy" else regularizer
    model.compile(optimizer, "mse", run_eagerly=True, regularizer=regularizer, **kwargs)
    return model


def fit(model, callbacks, epochs=4, **kwargs):
    kwargs = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, callbacks=callbacks, **kwargs)


def first_drop(ratio=0.75):
    """Return the first step whose rate lies below `ratio` times the highest before it."""
    return next(i for i, rate in enumerate(RATES) if rate < ratio * max(RATES[: i + 1]))


def assert_opened_at(step):
    assert ACTIVE == list(range(step, len(RATES)))


def plateau():
    # Nothing counts as an improvement after the first epoch: the rate falls after the second.
    return keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e6)


def scheduler():
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 if epoch < 2 else 0.01)


def rising_scheduler():
    return keras.callbacks.LearningRateScheduler(lambda epoch: [0.01, 0.1, 0.2, 0.05][epoch])


class LowerAtBatch(keras.callbacks.Callback):
    """Divide the rate by ten at a hook of a batch of the first epoch."""

    def __init__(self, batch, hook="on_train_batch_end"):
        super().__init__()
        self.batch = batch
        setattr(self, hook, self._act)

    def _act(self, batch, logs=None):
        if batch == self.batch and self.model.optimizer.learning_rate > 0.09:
            self.model.optimizer.learning_rate = 0.01


def scaled(rate):
    return keras.optimizers.LossScaleOptimizer(RecordingSGD(rate))


MECHANISMS = {
    # name: (optimizer, callback or None, step at which the gate opens)
    "ReduceLROnPlateau": (lambda: RecordingSGD(0.1), plateau, 4),
    "LearningRateScheduler": (lambda: RecordingSGD(0.1), scheduler, 4),
    "LearningRateScheduler, begins lower": (lambda: RecordingSGD(1.0), scheduler, 4),
    "LearningRateScheduler, rises first": (lambda: RecordingSGD(0.01), rising_scheduler, 6),
    "PiecewiseConstantDecay": (
        lambda: RecordingSGD(schedules.PiecewiseConstantDecay([2], [0.1, 0.01])),
        None,
        3,
    ),
    "ExponentialDecay": (lambda: RecordingSGD(schedules.ExponentialDecay(0.1, 4, 0.5)), None, 2),
    "ExponentialDecay, staircase": (
        lambda: RecordingSGD(schedules.ExponentialDecay(0.1, 5, 0.5, staircase=True)),
        None,
        5,
    ),
    "CosineDecay with warm-up": (
        lambda: RecordingSGD(
            schedules.CosineDecay(0.0, decay_steps=4, warmup_target=0.1, warmup_steps=2)
        ),
        None,
        4,
    ),
    "LossScaleOptimizer, ReduceLROnPlateau": (lambda: scaled(0.1), plateau, 4),
    "LossScaleOptimizer, PiecewiseConstantDecay": (
        lambda: scaled(schedules.PiecewiseConstantDecay([2], [0.1, 0.01])),
        None,
        3,
    ),
    "set after a batch": (lambda: RecordingSGD(0.1), lambda: LowerAtBatch(0), 1),
}
