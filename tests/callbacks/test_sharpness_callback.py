"""Eigenvalues and the edge of stability in the logs of `fit`, and their picture."""

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from frameworks import array, numpy, only_on
from keras import layers, optimizers
from measured_nets import Stop

from keras_infomcr import RegularizedModel
from keras_infomcr.callbacks import SharpnessCallback
from keras_infomcr.flatness import Hessian, hessian_trace_by_layer, plot
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.models.stability import stability_threshold
from keras_infomcr.regularizers import SharpnessAware, SubBatchPerturbation

# Where the values do not matter.
QUICK = {"num_examples": 5, "tolerance": 0.9}


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 3)), rng.normal(size=(20, 1))


def perceptron(optimizer="sgd", **kwargs):
    stack = [layers.Dense(3, "tanh"), layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *stack])
    model.compile(optimizer, "mse", **kwargs)
    return model


def hessian_by_numpy(weights, x, y):
    def loss(w):
        predictions = np.tanh(x @ w[0] + w[1]) @ w[2] + w[3]
        return oracle.squared_errors(y, predictions).mean()

    sizes = np.cumsum([w.size for w in weights])[:-1]
    columns = []
    for unit in np.eye(sum(w.size for w in weights)):
        parts = [p.reshape(w.shape) for p, w in zip(np.split(unit, sizes), weights)]
        product = oracle.hessian_vector_product(loss, weights, parts)
        columns.append(np.concatenate([p.ravel() for p in product]))
    return np.array(columns)


class Weights(keras.callbacks.Callback):
    """Keeps the weights before each step and after the last."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_train_batch_begin(self, batch, logs=None):
        self.kept.append(self.model.get_weights())

    def on_train_end(self, logs=None):
        self.kept.append(self.model.get_weights())


def fit(model, data, callback, epochs=2, others=(), **kwargs):
    settings = {"batch_size": 5, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(*data, epochs=epochs, callbacks=[callback, *others], **settings)


# ---------------------------------------------------------------- what is measured, and when


def test_eigenvalues_are_those_of_the_hessian_formed_each_time(float64, data, monkeypatch):
    products, original = [], LossFunction.hessian_vector_products

    def counting(self, data, at, vectors):
        products[-1] += len(vectors)
        return original(self, data, at, vectors)

    class Counted(SharpnessCallback):
        def measure(self):
            products.append(0)
            return super().measure()

    monkeypatch.setattr(LossFunction, "hessian_vector_products", counting)
    callback = Counted(data, frequency=4, unit="step", num_examples=None, tolerance=1e-3)
    weights = Weights()
    fit(perceptron(optimizers.SGD(0.1), run_eagerly=True), data, callback, others=[weights])
    np.testing.assert_array_equal(callback.record["step"], [0, 4, 8])
    for row, step in enumerate(callback.record["step"]):
        hessian = hessian_by_numpy(weights.kept[step], *data)
        eigenvalues = np.linalg.eigvalsh(hessian)
        eigenvalues = eigenvalues[np.argsort(-np.abs(eigenvalues))]
        for k in range(2):
            found = callback.record[f"hessian_eigenvalue_{k + 1}"][row]
            # The tolerance, of each, or of a hundredth of the largest.
            assert found == pytest.approx(eigenvalues[k], rel=1e-3, abs=1e-5 * eigenvalues[0])
    assert max(products[1:]) < products[0]


def test_epochs_hold_the_last_measurement_within_them(data):
    """Of 4 steps an epoch: measured before the steps 0, 6 and 12, and after the last, 16."""
    callback = SharpnessCallback(data, frequency=6, unit="step", **QUICK)
    logs = fit(perceptron(run_eagerly=True), data, callback, epochs=4).history
    np.testing.assert_array_equal(callback.record["step"], [0, 6, 12, 16])
    rows = callback.record["hessian_eigenvalue_1"]
    np.testing.assert_array_equal(logs["hessian_eigenvalue_1"], [rows[0], rows[1], np.nan, rows[3]])
    assert len(set(rows)) == 4


def test_measurements_by_epochs(data):
    callback = SharpnessCallback(data, frequency=2, num_examples=10, num_eigenvalues=1)
    logs = fit(perceptron(run_eagerly=True), data, callback, epochs=3).history
    np.testing.assert_array_equal(callback.record["step"], [8, 12])
    assert list(np.isfinite(logs["hessian_eigenvalue_1"])) == [False, True, True]
    assert "hessian_eigenvalue_2" not in logs
    # 20 numbers of one draw, whatever has been measured before.
    model = callback.model
    expected = Hessian(model, *data, num_examples=10, num_trials=1, seed=0)
    expected = expected.top_eigenvalues(num_eigenvalues=1, tolerance=1e-4).value
    assert logs["hessian_eigenvalue_1"][-1] == pytest.approx(expected, rel=0.01)


def test_training_that_ends_early(data):
    callback = SharpnessCallback(data, frequency=3, unit="step", **QUICK)
    fit(perceptron(run_eagerly=True), data, callback, epochs=5, others=[Stop(0, batch=1)])
    np.testing.assert_array_equal(callback.record["step"], [0, 2])


@pytest.mark.slow
@only_on("tensorflow", "jax", reason="torch takes one step at a time")
def test_executions_of_several_steps(data):
    """The steps 0 to 2 and 3 of an epoch in one go each: nothing can be measured between them."""
    callback = SharpnessCallback(data, frequency=3, unit="step", **QUICK)
    fit(perceptron(steps_per_execution=3, run_eagerly=True), data, callback, epochs=2)
    np.testing.assert_array_equal(callback.record["step"], [0, 3, 7, 8])


def test_traces_of_layers(data):
    callback = SharpnessCallback(data, num_examples=None, num_probes=20)
    model = perceptron(run_eagerly=True)
    logs = fit(model, data, callback, epochs=1).history
    hessian = hessian_by_numpy([w.astype("float64") for w in model.get_weights()], *data)
    expected = np.trace(hessian[:12, :12]), np.trace(hessian[12:, 12:])
    found = callback.trace_by_layer
    assert found.layers == tuple(layer.path for layer in model.layers)
    # 4 standard errors of 20 draws: one in a thousand.
    assert np.all(np.abs(found.values - expected) <= 4 * found.stderrs)
    plain = hessian_trace_by_layer(model, *data, num_products=20, method="hutchinson", seed=0)
    assert np.all(found.stderrs < plain.stderrs)
    np.testing.assert_array_equal(callback.record["hessian_trace_by_layer"][-1], found.values)
    assert callback.record["hessian_trace_by_layer"].shape == (1, 2)
    assert logs["hessian_trace"][-1] == pytest.approx(found.values.sum())
    assert 0 < logs["hessian_trace_stderr"][-1] <= found.stderrs.sum()


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_with_and_without(data):
    def trained(*callbacks):
        keras.utils.set_random_seed(0)
        model = perceptron("adam")
        model.fit(*data, batch_size=5, epochs=2, callbacks=list(callbacks), verbose=0)
        return [numpy(v) for v in [*model.variables, *model.optimizer.variables]]

    callback = SharpnessCallback(data, unit="step", frequency=3, num_examples=10, num_probes=2)
    for ours, plain in zip(trained(callback), trained()):
        np.testing.assert_array_equal(ours, plain)


def test_keras_need_not_wait_for_each_step():
    for hook in ("on_batch_end", "on_train_batch_end"):
        assert (
            keras.utils.is_default(getattr(SharpnessCallback, hook))
            if hasattr(keras.utils, "is_default")
            else getattr(SharpnessCallback, hook) is getattr(keras.callbacks.Callback, hook)
        )


@only_on("tensorflow", "torch", reason="Keras on JAX keeps the weights to train for a whole `fit`")
def test_layers_frozen_while_it_trains(data):
    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].trainable = epoch == 0

    callback = SharpnessCallback(data, **QUICK)
    fit(perceptron(run_eagerly=True), data, callback, others=[Freeze()])
    assert callback.result.vectors.shape == (2, 4)


@pytest.mark.slow
def test_models_that_wait_for_a_batch(data):
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    callback = SharpnessCallback(data, unit="step", num_eigenvalues=1, **QUICK)
    fit(model, data, callback, epochs=1)
    assert list(callback.record["step"])[-4:] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
def test_a_run_that_has_diverged_is_measured_as_nan(data):
    callback = SharpnessCallback(data, **QUICK)
    logs = fit(perceptron(optimizers.SGD(1e30), run_eagerly=True), data, callback).history
    assert np.isnan(logs["hessian_eigenvalue_1"][-1])


@pytest.mark.slow
def test_model_under_a_distribution_strategy(data, mirrored):
    with mirrored.scope():
        model = perceptron()
    callback = SharpnessCallback(data, unit="step", frequency=2, num_examples=None, tolerance=1e-4)
    fit(model, data, callback, batch_size=4)
    single = perceptron()
    single.set_weights(model.get_weights())
    expected = Hessian(single, *data).top_eigenvalues(num_eigenvalues=2, tolerance=1e-4)
    np.testing.assert_allclose(callback.result.eigenvalues, expected.eigenvalues, rtol=1e-3)


def test_verbose_prints_a_line_for_each_measurement(data, capsys):
    callback = SharpnessCallback(data, verbose=1, **QUICK)
    fit(perceptron(run_eagerly=True), data, callback)
    lines = capsys.readouterr().out.splitlines()
    first = callback.record["hessian_eigenvalue_1"][0]
    assert lines[0].startswith(f"Epoch 1: hessian_eigenvalue_1 {first:#.5g}, hessian_eigenvalue_2 ")
    assert "+-" not in lines[0]
    assert lines[2].startswith("hessian_eigenvalue_1, hessian_eigenvalue_2, stability_threshold t")


# ---------------------------------------------------------------- the threshold


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 2.0},
        {"momentum": 0.5, "weight_decay": 2.0},
    ],
)
def test_descent_diverges_above_the_threshold_and_converges_below(settings):
    model = perceptron(optimizers.SGD(0.1, **settings))
    threshold = stability_threshold(model, None)
    curvatures = threshold * np.array([0.97, 1.03])
    optimizer = optimizers.SGD(0.1, **settings)
    variable = keras.Variable(np.ones(2))
    sizes = []
    for _ in range(80):
        optimizer.apply([array(curvatures * numpy(variable), "float32")], [variable])
        sizes.append(np.abs(numpy(variable)))
    # The larger root is -1 at the threshold, and moves by 6 % or more per 3 % of the curvature.
    converging, diverging = np.transpose(sizes)
    assert converging[-1] < 0.1
    assert diverging[-1] > 10


@pytest.mark.parametrize(
    ("strength", "momentum"),
    [(0.5, 0.5), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1.0, 0.0), (0.5, 0.0)))],
)
def test_sharpness_aware_training_bounces_where_the_threshold_is_the_curvature(strength, momentum):
    """On l w^2 / 2 the steps end in a cycle w, -w: neither grows nor falls, the edge itself."""
    x, y = np.full((200, 1), 2.0, "float32"), np.zeros((200, 1), "float32")
    model = RegularizedModel.from_model(
        keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    )
    rule = SharpnessAware(rho=0.1, strength=strength)
    model.compile(optimizers.SGD(0.2, momentum=momentum), "mse", regularizer=rule)
    callback = SharpnessCallback((x, y), num_examples=None, num_eigenvalues=1)
    logs = model.fit(x, y, batch_size=2, callbacks=[callback], verbose=0).history
    assert logs["hessian_eigenvalue_1"][0] == pytest.approx(8, rel=1e-5)  # 2 x^2
    # A hundred steps of the contraction to the cycle, and float32.
    assert logs["stability_threshold"][0] == pytest.approx(8, rel=1e-3)


def regularized(rule):
    model = RegularizedModel.from_model(perceptron())
    model.compile(optimizers.SGD(0.1), "mse", regularizer=rule)
    return model


@pytest.mark.parametrize(
    "rule",
    [
        SharpnessAware(adaptive=True),
        SharpnessAware(num_sub_batches=2),
        SharpnessAware(direction="noise"),
        SubBatchPerturbation(num_sub_batches=2),
    ],
)
def test_no_threshold_under_other_rules_while_they_act(rule):
    model = regularized(rule)
    assert np.isnan(stability_threshold(model, lambda: 1.0))
    model.regularizer_active = False
    assert stability_threshold(model, None) == pytest.approx(20)
    model.regularizer_active = True
    model.regularizer.strength = 0.0
    assert stability_threshold(model, None) == pytest.approx(20)


def test_thresholds_under_sharpness_aware_training():
    model = regularized(SharpnessAware(rho=0.5))
    # 5 + 0.5 x 25 / (5/6) = 20
    assert stability_threshold(model, lambda: 5 / 6) == pytest.approx(5)
    assert stability_threshold(model, lambda: 0.0) == 0
    assert stability_threshold(model, lambda: 1e30) == pytest.approx(20)


class OtherSteps(optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(keras.ops.sign(gradient), variable, learning_rate)


def test_thresholds_of_optimizers():
    for optimizer in (optimizers.Adam(), OtherSteps()):
        assert np.isnan(stability_threshold(perceptron(optimizer), None))
    scaled = optimizers.LossScaleOptimizer(optimizers.SGD(0.1))
    assert stability_threshold(perceptron(scaled), None) == pytest.approx(20)
    assert stability_threshold(perceptron(optimizers.SGD(0.0)), None) == np.inf


def test_threshold_follows_a_schedule(data):
    schedule = optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.05])
    callback = SharpnessCallback(data, unit="step", **QUICK)
    fit(perceptron(optimizers.SGD(schedule), run_eagerly=True), data, callback, epochs=1)
    np.testing.assert_allclose(callback.record["stability_threshold"], [20, 20, 20, 40, 40])


# ---------------------------------------------------------------- the picture


def test_record_and_history_are_drawn():
    nan = np.nan
    record = {
        "step": np.array([0, 10, 20]),
        "hessian_eigenvalue_1": np.array([1.0, 2, 3]),
        "hessian_eigenvalue_2": np.array([0.5, 1, 2]),
        "stability_threshold": np.array([4.0, 4, 8]),
    }
    axes = plot.sharpness(record)
    first, second, threshold = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[0, 1], [10, 2], [20, 3]])
    np.testing.assert_array_equal(second.get_ydata(), [0.5, 1, 2])
    np.testing.assert_array_equal(threshold.get_xydata(), [[0, 4], [10, 4], [20, 8]])
    assert threshold.get_linestyle() == "--"
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "eigenvalue of the Hessian"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["eigenvalue 1", "eigenvalue 2", "stability threshold"]
    history = keras.callbacks.History()
    logs = {"hessian_eigenvalue_1": [nan, 2.0, nan, 4.0], "stability_threshold": [nan] * 4}
    history.history = logs
    for of_epochs in (history, logs):
        axes = plot.sharpness(of_epochs)
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[2, 2], [4, 4]])
        assert axes.get_xlabel() == "epoch"
        assert axes.get_legend().get_texts()[1].get_text() == "no stability threshold is known"
    assert plot.sharpness(logs, axes) is axes


def test_what_has_no_sharpness_is_refused():
    with pytest.raises(TypeError, match="`history` must be a `History` or a dictionary"):
        plot.sharpness([1.0])
    with pytest.raises(ValueError, match=r"logs of a `SharpnessCallback`\. Received: .*'loss'"):
        plot.sharpness({"loss": [1.0]})


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_eigenvalues": 0}, "`num_eigenvalues` must be an integer of at least 1"),
        ({"frequency": 0}, "`frequency` must be an integer of at least 1"),
        ({"unit": "batch"}, "`unit` must be one of 'epoch', 'step'"),
        ({"num_probes": 1}, "`num_probes` must be an integer of at least 2"),
        ({"num_examples": 0}, "`num_examples` must be an integer of at least 1"),
        ({"tolerance": 0}, "`tolerance` must be a finite number greater than 0"),
        ({"max_products": 1}, "`max_products` must be an integer of at least 2"),
        ({"training": 1}, "`training` must be `True` or `False`"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ({"verbose": 2}, "`verbose` must be one of 0, 1"),
    ],
)
def test_bad_settings_are_refused_at_once(data, settings, message):
    with pytest.raises(ValueError, match=message):
        SharpnessCallback(data, **settings)


def test_what_does_not_fit_is_refused_before_training(data):
    model = perceptron()
    with pytest.raises(ValueError, match="num_examples=1000, 20 examples"):
        fit(model, data, SharpnessCallback(data))
    with pytest.raises(ValueError, match="Labels are needed"):
        fit(model, data, SharpnessCallback([data[:1]]))
    with pytest.raises(ValueError, match=r"`data` must be one tuple"):
        SharpnessCallback(*data)
    assert int(model.optimizer.iterations) == 0
