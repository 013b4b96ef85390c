"""The gate and beta may change in mid-training, and take effect with the next batch."""

import functools

import keras
import numpy as np
import pytest
from frameworks import only_on
from literal_reading import ALPHA, BETA, literal_base, trained, weights_of
from parameters import slow_but
from small_nets import EAGER, XLA, X, Y, compiling, fitting, sgd, two_layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


class Call(keras.callbacks.Callback):
    """Call a function of the model and the batch before each batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_begin(self, batch, logs=None):
        self.function(self.model, batch)


class CallAfter(keras.callbacks.Callback):
    """Call a function of the model and the number of the next batch after each batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function(self.model, batch + 1)


def set_beta(model, beta):
    if isinstance(model, RegularizedModel):
        model.regularizer.beta = beta
    else:
        model.beta = beta


def check_schedule(act, betas, callback, mode):
    """Assert that a callback makes the three steps of an epoch use the given betas."""

    def fit(model):
        act(model, 0)
        return fitting(batch_size=2, callbacks=[callback(act)])(model)

    regularizer = SubBatchPerturbation(ALPHA, BETA, 2)
    ours, _ = trained(RegularizedModel, two_layers, fit, compiling(**mode), regularizer=regularizer)
    slow = weights_by_literal_reading(tuple(betas))
    effect = np.linalg.norm(slow - weights_by_literal_reading((0.0, 0.0, 0.0)))
    assert effect > 1e-6
    assert np.linalg.norm(weights_of(ours) - slow) <= 1e-9 * effect


@functools.cache
def weights_by_literal_reading(betas):
    """Return the weights after three steps with the given betas; a beta of 0 is plain Keras."""

    def fit(model):
        model.values = []
        steer = Call(lambda model, step: set_beta(model, betas[step]))
        return fitting(batch_size=2, callbacks=[steer])(model)

    slow, _ = trained(literal_base(), two_layers, fit, compiling(**EAGER))
    return weights_of(slow)


WHEN = {"opened": [False, True, True], "closed": [True, False, False], "both": [True, False, True]}


@pytest.mark.parametrize(("callback", "mode"), [(Call, {}), (CallAfter, {}), (Call, EAGER)])
@pytest.mark.parametrize("when", slow_but(WHEN.values(), WHEN["both"]), ids=WHEN)
def test_gate_flipped_in_fit_takes_effect_with_the_next_batch(callback, mode, when):
    def flip(model, batch):
        model.regularizer_active = when[min(batch, 2)]

    check_schedule(flip, [BETA * active for active in when], callback, mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "mode"), [(Call, {}), (CallAfter, {}), (Call, EAGER), (Call, XLA)]
)
def test_beta_assigned_in_fit_takes_effect_with_the_next_batch(callback, mode):
    betas = [0.5, 0.0, 4.0]
    check_schedule(lambda m, i: set_beta(m, betas[min(i, 2)]), betas, callback, mode)


def count_traces(callback, epochs=3):
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, x):
            traces.append(0)
            return x

    inputs = keras.Input((4,))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(Traced()(inputs)))
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    counts = []
    log = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(len(traces))
    )
    model.fit(X, Y, 2, epochs, 0, callbacks=[callback, log])
    return counts


@only_on("tensorflow", "jax", reason="On torch, Keras does not trace the step.")
def test_live_beta_is_not_retraced():
    counts = count_traces(Call(lambda model, batch: set_beta(model, 1.0 + batch)))
    assert counts[0] == counts[1] == counts[2]


@only_on("tensorflow", "jax", reason="On torch, Keras does not trace the step.")
def test_gate_is_traced_once_per_position():
    def flip(model, batch):
        model.regularizer_active = not model.regularizer_active

    counts = count_traces(Call(flip))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_gate_is_boolean(value):
    model = two_layers(RegularizedModel)
    message = "`regularizer_active` must be `True` or `False`. Received: regularizer_active="
    with pytest.raises(ValueError, match=message):
        model.regularizer_active = value
    assert model.regularizer_active is True


def test_gate_opens_between_compilations():
    model = two_layers(RegularizedModel)
    for active in (False, True):
        model.regularizer_active = active
        model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
        values = model.fit(X, Y, verbose=0).history["infomcr_reg"]
        assert np.isfinite(values[0]) == active
