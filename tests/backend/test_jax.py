"""What JAX users count on: one compilation, donated buffers, nothing fetched from the device."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND

if BACKEND != "jax":
    pytest.skip("properties of JAX", allow_module_level=True)

import jax

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 2)).astype("float32")
ESTIMATORS = ["finite_difference", "hessian_vector_product"]


def compiled(estimator="finite_difference", **kwargs):
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(3, "tanh")(inputs))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.2)(x)))
    regularizer = SubBatchPerturbation(0.01, 1.0, 2, estimator=estimator)
    model.compile("adam", "mse", metrics=["mae"], regularizer=regularizer, **kwargs)
    return model


def state_of(model):
    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([jax.numpy.copy(v.value) for v in variables] for variables in lists)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_is_compiled_once_whatever_beta(estimator):
    model = compiled(estimator)
    model.fit(X, Y, 4, verbose=0)
    before = _compilations()
    for beta in (0.0, 2.0, 7.0):
        model.regularizer.beta = beta
        model.fit(X, Y, 4, epochs=2, verbose=0)
    assert _compilations() == before


_COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: (
        _COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
)


def _compilations():
    return len(_COMPILED)


def test_compilations_are_counted():
    before = _compilations()
    jax.jit(lambda x: x + 3)(np.ones(7))
    assert _compilations() > before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_state_is_donated(estimator):
    model = compiled(estimator)
    model.fit(X, Y, 4, verbose=0)
    state = state_of(model)
    _, new_state = model.train_function(state, iter([(X[:4], Y[:4], None)]))
    assert all(array.is_deleted() for array in jax.tree.leaves(state))
    assert not any(array.is_deleted() for array in jax.tree.leaves(new_state))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_transfers_nothing(estimator):
    """Between host and device; Keras has put the batch there before."""
    model = compiled(estimator)
    model.fit(X, Y, 4, verbose=0)
    batch = jax.device_put((X[:4], Y[:4]))
    state = state_of(model)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            _, state = model.train_function(state, iter([(*batch, None)]))


def test_transfers_are_noticed():
    function = jax.jit(lambda x: x + 1)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="transfer"):
        function(X)


def test_beta_assigned_past_keras_callbacks_is_not_lost():
    """In mid-epoch `fit` holds the state; `model.regularizer` gives the variables back first."""
    model = compiled()
    seen = []

    def assign(batch, logs):
        model.regularizer.beta = 10.0 + batch
        seen.append(float(model.regularizer.beta.numpy()))

    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=assign)
    model.fit(X, Y, 4, verbose=0, callbacks=[callback])
    assert seen == [10.0, 11.0, 12.0]
    assert float(model.regularizer.beta.numpy()) == 12.0


def test_a_step_that_fails_loses_nothing():
    """Keras has taken the values from the variables when the first step is compiled."""
    model = compiled()
    before = [v.numpy() for v in model.variables]
    with pytest.raises(Exception, match=r"shape|rank|axis|size"):
        model.fit(X, np.ones((12, 7), "float32"), 4, verbose=0)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
    model.fit(X, Y, 4, verbose=0)


def test_float64_mode(float64):
    model = compiled()
    model.fit(X.astype("float64"), Y.astype("float64"), 4, verbose=0)
    assert {v.dtype for v in model.trainable_variables} == {"float64"}
    assert all(v.value.dtype == "float64" for v in model.trainable_variables)
    assert model.regularizer.beta.value.dtype == "float64"


def test_functions_of_jax_are_regularized_as_layers_of_keras_are():
    kernel = np.random.default_rng(2).normal(size=(4, 3)).astype("float32")
    of_jax = keras.layers.JaxLayer(
        lambda params, inputs: jax.numpy.tanh(inputs @ params["kernel"]),
        lambda rng, inputs: {"kernel": jax.numpy.zeros((4, 3))},
    )
    logs = []
    for layer in (of_jax, keras.layers.Dense(3, "tanh", use_bias=False)):
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(2, kernel_initializer="ones")(layer(inputs))
        model = RegularizedModel(inputs, outputs)
        layer.set_weights([kernel])
        model.compile("sgd", "mse", regularizer=SubBatchPerturbation(0.1, 5.0, 3))
        logs.append(model.fit(X, Y, 12, epochs=3, shuffle=False, verbose=0).history)
    # Three steps in float32; the regulariser is a difference of losses ten times as large.
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(logs[0]["infomcr_reg"], logs[1]["infomcr_reg"], rtol=1e-4)
    assert min(logs[0]["infomcr_reg"]) > 1e-3


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}])
def test_a_step_may_look_at_the_regularizer(mode):
    """That must not pass for a look from outside, which gives the state back to the variables."""

    class Looking(RegularizedModel):
        def train_step(self, *args):
            assert self.regularizer.alpha == 0.01
            return super().train_step(*args)

        def test_step(self, *args):
            assert self.regularizer.alpha == 0.01
            return super().test_step(*args)

        def compute_loss(self, *args, **kwargs):
            assert self.regularizer.alpha == 0.01
            return super().compute_loss(*args, **kwargs)

    weights = []
    for base in (Looking, RegularizedModel):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        model = base(inputs, keras.layers.Dense(2)(inputs))
        rule = SubBatchPerturbation(0.01, 1.0, 2, main_gradient="full_batch")
        model.compile("sgd", "mse", regularizer=rule, **mode)
        model.fit(X, Y, 5, epochs=2, shuffle=False, verbose=0)
        assert int(model.optimizer.iterations.numpy()) == 6
        weights.append([*model.get_weights(), model.evaluate(X, Y, 5, verbose=0)])
    # A loss of its own keeps a model from taking its sub-batches at once, which rounds otherwise:
    # by 2**-24 for each of some ten operations, in each of six steps.
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=60 * 2**-24)


def test_an_interrupted_compilation_loses_nothing():
    def interrupted(y, y_pred):
        raise KeyboardInterrupt

    model = compiled()
    model.compile("sgd", interrupted)
    before = model.get_weights()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_a_train_step_of_the_instance_is_used_and_kept():
    model, calls = compiled(), []
    inherited = model.train_step

    def train_step(*args):
        calls.append(1)
        return inherited(*args)

    model.train_step = train_step
    model.fit(X, Y, 4, verbose=0)
    assert calls and model.train_step is train_step


def test_the_gate_opens_past_keras_callbacks():
    model, seen = compiled(), []
    model.regularizer_active = False

    def open_gate(batch, logs):
        model.regularizer_active = batch > 0
        seen.append(model.regularizer_active)

    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=open_gate)
    logs = model.fit(X, Y, 4, verbose=0, callbacks=[callback]).history
    assert seen == [False, True, True]
    assert np.isfinite(logs["infomcr_reg"]).all()
