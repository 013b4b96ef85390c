"""The gate opens before exactly the batch that first uses a lower learning rate."""

import re
import types

import keras
import numpy as np
import pytest
from frameworks import BACKEND, only_on
from keras import layers
from keras.optimizers import schedules

from keras_infomcr import RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.callbacks import FlatnessCallback, RegularizationSchedule
from keras_infomcr.regularizers import Regularizer, SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 1)).astype("float32")
STEPS = 2  # an epoch

RATES = []  # the learning rate that the optimizer used in each step
ACTIVE = []  # the steps in which the regulariser acted

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
    """Notes when it is asked, and asks for nothing."""

    num_sub_batches = 1

    def __init__(self, strength=1.0):
        super().__init__(strength)

    def __call__(self, objective, batch):
        ACTIVE.append(len(RATES))
        return types.SimpleNamespace(value=0.0, gradient=[None])

    def get_config(self):
        return {"strength": float(self.strength)}


@register
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.out = layers.Dense(1, use_bias=False)

    def call(self, inputs):
        return self.out(inputs)


@pytest.fixture(autouse=True)
def forget():
    RATES.clear()
    ACTIVE.clear()


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
    """Compile, eagerly so that `RATES` and `ACTIVE` are filled at each step."""
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


# Every mechanism


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


@pytest.mark.parametrize("start_first", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS)
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


@pytest.mark.parametrize("factor", [0.1, 0.2, 0.5])
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
        (schedules.PolynomialDecay(0.1, decay_steps=24, end_learning_rate=0.0), 1 / 4),
        # 0.9^2 = 0.81, 0.9^3 = 0.729.
        (schedules.ExponentialDecay(0.1, 2, 0.9, staircase=True), 6 / 24),
    ],
    ids=["cosine", "linear", "steps of 0.9"],
)
def test_by_default_smooth_decays_open_it_in_mid_training(rate, share):
    """At the first step after that share of the course, the step of that share itself included.

    There the rate is the limit itself, and rounding decides.
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


@pytest.mark.parametrize(("ratio", "step"), [(1.0, 2), (0.99, 4), (0.85, 4), (0.75, 6)])
def test_ratio(ratio, step):
    model = compiled(0.1)
    rates = keras.callbacks.LearningRateScheduler(lambda e: [0.1, 0.0995, 0.08, 0.07][e])
    fit(model, [rates, StartRegAfterLRDrop(ratio=ratio)])
    assert first_drop(ratio) == step
    assert_opened_at(step)


@pytest.mark.parametrize(("start_epoch", "step"), [(0, 0), (1, 2), (2, 4), (3, 4), (None, 4)])
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


@pytest.mark.parametrize("make", [functional, wrapped])
def test_opens_a_compiled_step(make):
    """The weights are those of plain Keras up to the drop, and others from there on."""
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


@only_on("tensorflow", "jax", reason="Keras refuses `steps_per_execution` on torch")
@pytest.mark.parametrize(("boundary", "batch"), [(5, 7), (4, 7), (3, 5)])
def test_steps_per_execution(boundary, batch):
    """The drop is seen at the next execution of two steps."""
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


# Messages


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


NEVER = r"never started: .* below `ratio` times its peak\. Received: ratio=0\.75, start_epoch=None"


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
    """Train two epochs in which the gate never opens; return the model."""
    model = make()
    model.compile(optimizer(), "mse", regularizer=Spy())
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
    """Warnings are errors here: this one ends training before the first step."""
    model, train = at_constant_rate(callbacks(tmp_path), **settings)
    with pytest.raises(UserWarning, match=ALWAYS):
        train()
    assert int(model.optimizer.iterations) == 0


class Idle(keras.callbacks.Callback):
    """Could do anything."""


class OwnStep(RegularizedModel):
    """May set the rate in its step."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1)

    def call(self, inputs):
        return self.out(inputs)

    def train_step(self, *args):
        return super().train_step(*args)


class OwnSGD(keras.optimizers.SGD):
    """May change its rate."""


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        ([keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)], {}),
        ([keras.callbacks.ReduceLROnPlateau("loss", patience=9)], {}),
        ([keras.callbacks.LambdaCallback()], {}),
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


# Resuming


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
    """Begin or resume a run, as a new process would; perhaps end it in mid-air."""
    model, callbacks = prepared(mechanism, make)
    callbacks += [keras.callbacks.BackupAndRestore(directory), StartRegAfterLRDrop()]
    callbacks = [callbacks[i] for i in order if i < len(callbacks)]
    try:
        fit(model, [*callbacks, InterruptBefore(until)], epochs)
    except Interruption:
        assert until is not None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("mechanism", RESUMABLE)
def test_resumes_with_backup_and_restore(mechanism, epoch, order, tmp_path):
    run(mechanism, tmp_path, epoch, order)
    assert len(RATES) == epoch * STEPS
    run(mechanism, tmp_path, None, order)
    assert len(RATES) == 4 * STEPS
    assert_opened_at(first_drop())


@pytest.mark.parametrize("epoch", [1, 2, 3])
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


@pytest.mark.parametrize("mechanism", ["ReduceLROnPlateau", "PiecewiseConstantDecay"])
def test_resumes_twice(mechanism, tmp_path):
    for epoch in (1, 3, 4, None):
        run(mechanism, tmp_path, epoch, epochs=5)
    assert_opened_at(first_drop())


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("mechanism", ["ReduceLROnPlateau", "PiecewiseConstantDecay"])
def test_resumes_a_wrapped_model(mechanism, epoch, tmp_path):
    run(mechanism, tmp_path, epoch, make=wrapped)
    run(mechanism, tmp_path, make=wrapped)
    assert_opened_at(first_drop())


@pytest.mark.parametrize("make", [functional, wrapped])
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("mechanism", ["ReduceLROnPlateau", "CosineDecay with warm-up"])
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
    """The schedule counts batches, `iterations` counts updates."""
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
    """Without the optimizer's state, the rates of the run that made the file do not count."""
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
@pytest.mark.parametrize("make", [functional, wrapped])
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


@pytest.mark.parametrize("epochs", [1, 3])
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
