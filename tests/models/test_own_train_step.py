"""A user's own `train_step`: as in plain Keras, and regularised if it calls the inherited one."""

import pathlib
import re
import warnings

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy, only_on

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "own_train_step.md"
X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 1)).astype("float32")
DID_NOT_ACT = "The regulariser did not act"

on_jax = only_on("jax", reason="Only on JAX does a train step take and return the state.")
unregularized = pytest.mark.filterwarnings(f"ignore:{DID_NOT_ACT}")


def network(base):
    inputs = keras.Input((3,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(4, "tanh")(inputs))
    return base(inputs, keras.layers.Dense(1)(hidden))


def trained(base, regularizer=None, fit=None, **kwargs):
    """Return a model, trained from a fixed seed, and its logs without what we add to them."""
    keras.utils.set_random_seed(0)
    model = network(base)
    if regularizer is not None:
        kwargs["regularizer"] = regularizer
    model.compile(optimizer=keras.optimizers.Adam(0.01), **kwargs)
    logs = model.fit(X, Y, batch_size=8, epochs=2, verbose=0, **(fit or {})).history
    return model, {key: value for key, value in logs.items() if key != "infomcr_reg"}


def assert_trains_as_in_keras(step, **kwargs):
    """Compare classes that differ only in their base, and run one program: to the bit."""
    ours, logs = trained(step(RegularizedModel), SubBatchPerturbation(), **kwargs)
    plain, expected = trained(step(keras.Model), **kwargs)
    assert logs == expected
    for a, b in zip(ours.variables, plain.variables):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    assert ours.evaluate(X, Y, verbose=0) == plain.evaluate(X, Y, verbose=0)


def gradient_step(base):
    """Return a class whose stateless step updates the metrics in `metrics` alone."""
    import jax

    class Net(base):
        def loss_and_updates(self, weights, others, x, y, training=False):
            y_pred, others = self.stateless_call(weights, others, x, training=training)
            return self.compute_loss(x, y, y_pred), (y_pred, others)

        def updated(self, variables, loss, y, y_pred):
            logs, new = {}, []
            for metric in self.metrics:
                own = variables[len(new) : len(new) + len(metric.variables)]
                seen = (loss,) if metric.name == "loss" else (y, y_pred)
                own = metric.stateless_update_state(own, *seen)
                logs[metric.name] = metric.stateless_result(own)
                new += own
            assert len(new) == len(variables) == len(self.metrics_variables)
            return logs, new

        def train_step(self, state, data):
            weights, others, of_optimizer, of_metrics = state
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            gradient = jax.value_and_grad(self.loss_and_updates, has_aux=True)
            (loss, (y_pred, others)), found = gradient(weights, others, x, y, training=True)
            weights, of_optimizer = self.optimizer.stateless_apply(of_optimizer, found, weights)
            logs, of_metrics = self.updated(of_metrics, loss, y, y_pred)
            return logs, (weights, others, of_optimizer, of_metrics)

        def test_step(self, state, data):
            weights, others, of_metrics = state
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            loss, (y_pred, others) = self.loss_and_updates(weights, others, x, y)
            logs, of_metrics = self.updated(of_metrics, loss, y, y_pred)
            return logs, (weights, others, of_metrics)

    return Net


def step_with_metrics_of_its_own(base):
    """Return a class whose step assumes that `metrics` are the two that its author made."""

    class Net(gradient_step(base)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mean = keras.metrics.Mean(name="loss")
            self.error = keras.metrics.MeanAbsoluteError(name="mae")
            self.squares = keras.losses.MeanSquaredError()

        @property
        def metrics(self):
            return [self.mean, self.error]

        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            return self.squares(y, y_pred)

        def updated(self, variables, loss, y, y_pred):
            count = len(self.mean.variables)
            mean = self.mean.stateless_update_state(variables[:count], loss)
            error = self.error.stateless_update_state(variables[count:], y, y_pred)
            logs = self.mean.stateless_result(mean), self.error.stateless_result(error)
            return dict(zip(("loss", "mae"), logs)), mean + error

    return Net


@on_jax
@unregularized
@pytest.mark.parametrize(
    "mode",
    [{}, *(pytest.param(m, marks=pytest.mark.slow) for m in (
        {"run_eagerly": True}, {"steps_per_execution": 2}
    ))],
    ids=lambda mode: next(iter(mode), "compiled"),
)  # fmt: skip
def test_a_stateless_step_of_the_users_trains_as_in_keras(mode):
    assert_trains_as_in_keras(gradient_step, loss="mse", metrics=["mae"], **mode)
    assert_trains_as_in_keras(step_with_metrics_of_its_own, **mode)


@unregularized
def test_a_step_that_does_not_call_the_inherited_one_trains_as_in_keras():
    def step(base):
        class Net(base):
            def train_step(self, *args):
                return keras.Model.train_step(self, *args)

        return Net

    assert_trains_as_in_keras(step, loss="mse", metrics=["mae"])


@on_jax
def test_a_stateless_step_may_pass_on_lists_of_its_own():
    class Net(RegularizedModel):
        def train_step(self, state, data):
            logs, state = super().train_step(tuple(map(list, state)), data)
            lists = (
                self.trainable_variables,
                self.non_trainable_variables,
                self.optimizer.variables,
                self.metrics_variables,
            )
            assert list(map(len, state)) == list(map(len, lists))
            return logs, tuple(map(list, state))

    histories, weights = [], []
    for base in (Net, RegularizedModel):
        model, _ = trained(base, SubBatchPerturbation(num_sub_batches=2), loss="mse")
        histories.append(model.history.history)
        weights.append(model.get_weights())
    assert histories[0] == histories[1]
    assert np.all(np.array(histories[0]["infomcr_reg"]) > 0)
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


class OpenInLastEpoch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.is_last = epoch == 1

    def on_train_batch_begin(self, batch, logs=None):
        if self.is_last and batch == 1:
            self.model.regularizer_active = True


class OpenAfterLastBatch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.regularizer_active = True


@pytest.mark.parametrize(
    "callback, count", [(None, 1), (OpenInLastEpoch, 1), (OpenAfterLastBatch, 0)]
)
def test_one_warning_where_the_gate_was_open_for_a_batch(callback, count):
    class Net(RegularizedModel):
        def train_step(self, *args):
            return keras.Model.train_step(self, *args)

    model = network(Net)
    model.compile("sgd", "mse")
    model.regularizer_active = callback is None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        callbacks = [callback()] if callback else None
        for _ in range(2 if callback is None else 1):
            model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    assert sum(str(w.message).startswith(DID_NOT_ACT) for w in warned) == count


# The page of the docs


def blocks_of_page():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_has_a_step_for_each_kind_of_backend():
    assert ["state, data" in block for block in blocks_of_page()] == [False, True]


def test_the_step_of_the_page_is_regularised():
    names = {}
    for block in blocks_of_page():
        if ("state, data" in block) == (BACKEND == "jax"):
            exec(compile(block, str(PAGE), "exec"), names)
    seen = []

    class Seeing(names["Weighted"]):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            seen.append(sample_weight)
            return super().compute_metrics(x, y, y_pred, sample_weight)

    model = network(Seeing)
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    model.run_eagerly = True
    logs = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history
    assert np.all(np.array(logs["infomcr_reg"]) > 0)
    np.testing.assert_allclose(numpy(seen[0]), np.abs(Y[:8, 0]), rtol=1e-6)
    np.testing.assert_allclose(logs["weight"], np.abs(Y[8:]).mean(), rtol=1e-6)
