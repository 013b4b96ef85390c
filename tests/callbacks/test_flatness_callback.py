"""Measures of flatness in the logs of `fit`: which, when, and without a trace in the training."""

import csv
import functools
import math

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy
from keras import layers

from keras_infomcr import RegularizedModel, flatness
from keras_infomcr.callbacks import FlatnessCallback
from keras_infomcr.flatness import Estimate, fisher_trace, hessian_spectral_density, hessian_trace
from keras_infomcr.regularizers import SubBatchPerturbation

NUM_CLASSES = 4
# Where tests are not of what is compiled, without a graph, but on JAX, where that is slower.
EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
TRACE = functools.partial(hessian_trace, num_products=6, seed=0)


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 20)


def classifier(base=keras.Sequential, **kwargs):
    stack = [layers.Dense(5), layers.BatchNormalization(), layers.Dense(NUM_CLASSES)]
    model = base([keras.Input((6,)), *stack])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **kwargs)
    return model


def fit(model, data, *measures, epochs=2, callbacks=(), **settings):
    callback = FlatnessCallback(data, measures, **settings)
    callbacks = [callback, *callbacks]
    history = model.fit(*data, epochs=epochs, batch_size=4, callbacks=callbacks, verbose=0)
    return history.history, callback


def count_of_weights(model, x, y):
    return Estimate(model.count_params(), math.nan, np.zeros(0))


def test_logged_values_are_those_of_the_functions(data):
    """Of the weights and the batch-norm statistics at the end of the epoch."""
    model = classifier()
    on_trials = functools.partial(fisher_trace, num_examples=5, num_trials=2, seed=0)
    logs, callback = fit(model, data, TRACE, on_trials, count_of_weights)
    for function in (TRACE, on_trials):
        name, expected = function.func.__name__, function(model, *data)
        # The same graph on the same numbers.
        assert logs[name][-1] == pytest.approx(expected.value, rel=1e-6)
        assert logs[f"{name}_stderr"][-1] == pytest.approx(expected.stderr, rel=1e-4)
        assert logs[name][0] != pytest.approx(logs[name][1], rel=1e-4)
        assert callback.results[name].value == logs[name][-1]
    assert logs["count_of_weights"] == [model.count_params()] * 2
    assert np.isnan(logs["count_of_weights_stderr"]).all()


def test_a_name_stands_for_one_draw(data):
    """Runs and processes compare; without a seed no two values are the same."""
    model = classifier()
    logs, _ = fit(model, data, "local_entropy", epochs=1)
    expected = flatness.local_entropy(model, *data, seed=0).value
    assert logs["local_entropy"][0] == pytest.approx(expected, rel=1e-6)  # the same graph
    assert flatness.local_entropy(model, *data).value != pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_every_measure_has_a_name(data):
    """Small settings are the defaults of none: they are given by names of partial functions."""
    names = sorted(
        {n for n in flatness.__all__ if n.islower()}
        - {"loss_between", "loss_surface", "pac_bayes_bound", "plot", "reestimate_batch_norm"}
    )
    small = {"gamma": 5, "gamma_hat": 5, "fisher": 5}
    # Which give no single number.
    others = {"gamma_hat_by_layer", "hessian_spectral_density", "hessian_trace_by_layer"}
    measures = []
    for name in names:
        if name in others:
            continue
        function = getattr(flatness, name)
        size = small.get(name) or small.get(name.partition("_")[0])
        settings = {"num_examples": size} if size else {}
        measures.append(functools.partial(function, **settings) if settings else name)
    logs, _ = fit(classifier(), data, *measures, epochs=1)
    assert all(np.isfinite(logs[name][0]) for name in set(names) - others)
    assert len(set(names) - others) == 18


def test_keys_stand_in_the_logs_of_each_epoch(data, tmp_path):
    """`CSVLogger` freezes its columns at the first."""
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    logs, _ = fit(classifier(), data, TRACE, epochs=5, frequency=2, callbacks=[logger])
    measured = [False, True, False, True, True]
    for key in ("hessian_trace", "hessian_trace_stderr"):
        assert list(np.isfinite(logs[key])) == measured
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["hessian_trace"]) for row in rows][1] == pytest.approx(
        logs["hessian_trace"][1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", [keras.Sequential, RegularizedModel])
def test_training_is_the_same_to_the_bit_with_and_without(data, base):
    def trained(*measures):
        keras.utils.set_random_seed(0)
        if base is keras.Sequential:
            model = classifier()
        else:
            model = RegularizedModel.from_model(classifier())
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adam", loss, regularizer=SubBatchPerturbation(num_sub_batches=2))
        callbacks = [FlatnessCallback(data, measures)] if measures else []
        model.fit(*data, epochs=2, batch_size=5, callbacks=callbacks, verbose=0)
        return [numpy(v) for v in [*model.variables, *model.optimizer.variables]]

    for ours, plain in zip(trained(TRACE, "local_energy", "input_jacobian_norm"), trained()):
        np.testing.assert_array_equal(ours, plain)


def test_further_epochs_compile_nothing_new(data):
    """Python runs a layer's `call` where it is traced; on torch always."""
    if BACKEND == "torch":
        pytest.skip("torch compiles nothing here")
    traced = []

    class Counting(layers.Dense):
        def call(self, inputs):
            traced.append(inputs)
            return super().call(inputs)

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            counts.append(len(traced))

    counts = []
    model = keras.Sequential([keras.Input((6,)), Counting(NUM_CLASSES)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    measures = [TRACE, "hessian_spectral_radius", "local_entropy", "adaptive_sharpness"]
    measures += ["input_jacobian_norm", functools.partial(fisher_trace, num_examples=5)]
    fit(model, data, *measures, epochs=4, callbacks=[Count()])
    assert counts[0] > 0
    # Gamma-hat's and Fisher's estimator tries its taps on each use; the others trace once.
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.slow
def test_batches_and_a_second_run(data):
    x, y = data
    model = classifier()
    callback = FlatnessCallback([(x[:10], y[:10]), (x[10:], y[10:])], [TRACE])
    for _ in range(2):
        logs = model.fit(x, y, callbacks=[callback], verbose=0).history
        expected = TRACE(model, x, y)
        assert logs["hessian_trace"][0] == pytest.approx(expected.value, rel=1e-5)


def test_verbose_prints_a_line_for_each_measurement(data, capsys):
    fit(classifier(**EAGER), data, TRACE, verbose=1, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Epoch 1: hessian_trace ")
    assert lines[2].startswith("hessian_trace takes ")


@pytest.mark.slow
def test_model_under_a_distribution_strategy(data, mirrored):
    with mirrored.scope():
        model = classifier()
    logs, _ = fit(model, data, TRACE, epochs=1)
    single = classifier()
    single.set_weights(model.get_weights())
    assert logs["hessian_trace"][0] == pytest.approx(TRACE(single, *data).value, rel=1e-5)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ([], "`measures` must be a list of names or functions, not empty"),
        ("hessian_trace", "`measures` must be a list of names or functions"),
        (hessian_trace, "`measures` must be a list of names or functions"),
        ({"hessian_trace"}, "`measures` must be a list of names or functions"),
        (["flatness"], "some of the names .*'hessian_trace'.*Received: 'flatness'"),
        (["pac_bayes_bound"], "some of the names"),
        (["hessian_spectral_density"], "some of the names"),
        ([3], "`measures` must hold names or functions. Received: 3"),
        ([TRACE, "hessian_trace"], "must have different names"),
    ],
)
def test_bad_measures_are_refused_at_once(data, measures, message):
    with pytest.raises(ValueError, match=message):
        FlatnessCallback(data, measures)


def test_bad_settings_are_refused_at_once(data):
    with pytest.raises(ValueError, match="`frequency` must be an integer of at least 1"):
        FlatnessCallback(data, [TRACE], frequency=0)
    with pytest.raises(ValueError, match="`verbose` must be one of 0, 1"):
        FlatnessCallback(data, [TRACE], verbose=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
def test_measures_of_other_models_and_data_are_their_own(data):
    """What is compiled is kept for the model and the data that it was compiled for."""
    other, (x, y) = classifier(), data

    def of_other(model, x, y):
        return TRACE(other, x, y)

    def of_few(model, x, y):
        return fisher_trace(model, x[:6].copy(), y[:6], num_examples=6, num_trials=1, seed=0)

    def of_more(model, x, y):
        return fisher_trace(model, x[6:12].copy(), y[6:12], num_examples=6, num_trials=1, seed=0)

    model = classifier()
    logs, _ = fit(model, data, TRACE, of_other, of_few, of_more, epochs=2)
    for function in (TRACE, of_other, of_few, of_more):
        name = getattr(function, "__name__", "hessian_trace")
        assert logs[name][-1] == pytest.approx(function(model, x, y).value, rel=1e-5)


SUM = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


@pytest.mark.parametrize(
    ("measure", "loss", "error", "message"),
    [
        *(
            (name, None, ValueError, rf"Received: '{name}', .*num_examples=100, 20 examples")
            for name in ("fisher_trace", "fisher_spectral_radius", "gamma", "gamma_hat")
        ),
        (functools.partial(fisher_trace, num_examples=30), None, ValueError,
         r"Use `num_examples=20`.*Its arguments are set by `functools\.partial\(fisher_trace, "),
        (functools.partial(hessian_trace, num_examples=21), None, ValueError,
         "num_examples=21, 20 examples"),
        (functools.partial(hessian_trace, num_products=0), None, ValueError, "`num_products` must"),
        (functools.partial(hessian_trace, num_product=3), None, TypeError, "num_product"),
        (functools.partial(fisher_trace, chunk=3), None, TypeError, "chunk"),
        (functools.partial(fisher_trace, num_examples=5, training=True), "mse", ValueError,
         "`training` must be `False`"),
        ("hessian_spectral_radius", SUM, ValueError, "must be a mean over the examples"),
        ("local_energy", SUM, ValueError, "must be a mean over the examples"),
        ("adaptive_sharpness", SUM, ValueError, "must be a mean over the examples"),
    ],
    ids=lambda value: str(getattr(value, "keywords", value))[:20],
)  # fmt: skip
def test_what_a_measure_refuses_is_said_before_training(data, measure, loss, error, message):
    model = classifier()
    if loss is not None:
        model.compile("sgd", loss)
    with pytest.raises(error, match=message):
        fit(model, data, measure, frequency=5)
    assert int(model.optimizer.iterations) == 0


def test_labels_are_checked_before_training(data):
    x, y = data
    measure = functools.partial(fisher_trace, num_examples=5)
    model = classifier()
    callbacks = [FlatnessCallback((x, y + 3), [measure], frequency=5)]
    with pytest.raises(ValueError, match=r"`measures` must fit .*`y` must hold integers from 0 to"):
        model.fit(x, y, callbacks=callbacks, verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_measures_of_a_model_that_is_not_built_are_checked_as_soon_as_it_is(data):
    model = keras.Sequential([layers.Dense(NUM_CLASSES)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="num_examples=100, 20 examples"):
        fit(model, data, "fisher_trace", frequency=5)
    # TensorFlow builds it in the first step, the others before.
    assert int(model.optimizer.iterations) == (1 if BACKEND == "tensorflow" else 0)


def test_checking_computes_nothing(data, monkeypatch):
    """Neither do functions of the user run, nor do results come before the first epoch's end."""
    calls, seen = [], []

    def of_user(model, x, y):
        calls.append(1)
        return count_of_weights(model, x, y)

    class See(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append((dict(callback.results), len(calls)))

    few = functools.partial(fisher_trace, num_examples=5)
    callback = FlatnessCallback(data, [of_user, TRACE, few, "input_jacobian_norm", "local_energy"])
    classifier().fit(*data, batch_size=20, callbacks=[callback, See()], verbose=0)
    assert seen == [({}, 0)]
    assert len(calls) == 1 and len(callback.results) == 5


def test_a_callback_that_reads_the_logs_too_early_is_named(data):
    early = keras.callbacks.EarlyStopping("hessian_trace", mode="min")
    message = r"`FlatnessCallback` must stand before .*\['EarlyStopping'\] will not see \['hessian_"
    with pytest.raises(UserWarning, match=message):  # warnings are errors here
        classifier().fit(*data, callbacks=[early, FlatnessCallback(data, [TRACE])], verbose=0)


def test_data_are_checked_before_training(data):
    model = classifier()
    before = model.get_weights()
    for bad, message in [
        (iter([data]), "read to their end, several times"),
        ([], "must not be empty"),
        ([(np.full_like(data[0], np.nan), data[1])], "`x` must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model, data, TRACE, callbacks=[FlatnessCallback(bad, [TRACE])])
    for weight, value in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, value)


@pytest.mark.parametrize(
    "measure", [functools.partial(hessian_spectral_density, num_steps=2), lambda model, x, y: 3.0]
)
def test_results_that_are_no_single_number(data, measure):
    with pytest.raises(ValueError, match="result with a single number as its `value`"):
        fit(classifier(**EAGER), data, measure, epochs=1)
