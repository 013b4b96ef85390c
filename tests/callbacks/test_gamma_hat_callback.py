"""gamma-hat in the logs of `fit`: when, of what, and without a trace in the training."""

import gc
import os
import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, global_random_number
from keras import layers
from measured_nets import DRAW, NAN, NUM_CLASSES, Stop, classifier, compiled, dataset, unchanging

from keras_infomcr import GammaHatCallback, RegularizedModel
from keras_infomcr.callbacks import FlatnessCallback
from keras_infomcr.flatness import GammaHat, gamma_hat, hessian_trace
from keras_infomcr.regularizers import SubBatchPerturbation


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


# ---------------------------------------------------------------- when it measures


@pytest.mark.parametrize(
    ("frequency", "epochs", "initial_epoch", "measured"),
    [
        pytest.param(1, 3, 0, [True, True, True], marks=pytest.mark.slow),
        (2, 5, 0, [False, True, False, True, True]),
        (3, 6, 2, [True, False, False, True]),
        pytest.param(10, 2, 0, [False, True], marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: dataset(x, y).batch(4),
        pytest.param(lambda x, y: [(x[:13], y[:13]), (x[13:], y[13:])], marks=pytest.mark.slow),
        pytest.param(lambda x, y: (x, y, np.ones(20)), marks=pytest.mark.slow),
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


class OfUsers(keras.utils.PyDataset):
    """Two batches of what users have."""

    def __init__(self, x, y):
        super().__init__()
        self._x, self._y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(0, 8) if index == 0 else slice(8, None)
        return {"of_users": self._x[rows]}, self._y[rows]


@pytest.mark.parametrize(
    "make",
    [
        OfUsers,
        pytest.param(lambda x, y: ({"of_users": x}, y), marks=pytest.mark.slow),
        pytest.param(lambda x, y: ({"of_users": x}, y, np.ones(20)), marks=pytest.mark.slow),
        pytest.param(
            lambda x, y: [({"of_users": x[:8]}, y[:8]), ({"of_users": x[8:]}, y[8:])],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dataset", "arrays", "weighted", "batches"],
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
