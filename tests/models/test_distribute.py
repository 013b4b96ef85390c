"""Training under `tf.distribute.MirroredStrategy`, on two logical CPU devices."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

if BACKEND != "tensorflow":
    pytest.skip("`tf.distribute` is TensorFlow's", allow_module_level=True)

import tensorflow as tf

BETA = 5.0

draw = np.random.default_rng(0)
X = draw.normal(size=(24, 4)).astype("float32")
Y = draw.normal(size=(24, 2)).astype("float32")
WEIGHTS = draw.uniform(0.2, 3, size=24).astype("float32")


def network(activation="tanh", normalize=False):
    penalty = keras.regularizers.L2(1 / 64)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, activation, kernel_regularizer=penalty)(inputs)
    if normalize:
        x = keras.layers.Dropout(0.25)(keras.layers.BatchNormalization()(x))
    return inputs, keras.layers.Dense(2, dtype=keras.config.floatx())(x)


def gelu():
    return network("gelu")


def normalized():
    return network(normalize=True)


def regularizer(beta=BETA, num_sub_batches=4, **kwargs):
    return SubBatchPerturbation(0.05, beta, num_sub_batches, **kwargs)


def train(strategy, base=RegularizedModel, outputs=network, fit=None, momentum=0.5, **kwargs):
    """Train for an epoch of three batches of 8; return the model and its logs.

    Args:
        strategy: The `tf.distribute.Strategy`.
        base: `RegularizedModel` or `keras.Model`.
        outputs: Function that returns the inputs and outputs of the model.
        fit: Other arguments of `fit`.
        momentum: Float, of the optimizer.
        **kwargs: Of `regularizer`, or the regulariser itself.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = base(*outputs())
        if base is RegularizedModel and "regularizer" not in kwargs:
            kwargs = {"regularizer": regularizer(**kwargs)}
        # Numbers exact in float32, through which Keras takes them.
        optimizer = keras.optimizers.SGD(1 / 8, momentum=momentum)
        model.compile(optimizer, "mse", weighted_metrics=["mae"], **kwargs)
    fit = {"sample_weight": WEIGHTS, **(fit or {})}
    return model, model.fit(
        X, Y, **{"batch_size": 8, "shuffle": False, "verbose": 0, **fit}
    ).history


def flat(variables):
    return np.concatenate([np.ravel(v.numpy()) for v in variables]).astype("float64")


def replicas(model):
    """Return the variables as each replica holds them."""
    values = [v.value.values for v in [*model.weights, *model.optimizer.variables]]
    return [np.concatenate([np.ravel(a[i].numpy()) for a in values]) for i in range(2)]


ONE_DEVICE = tf.distribute.get_strategy()


@pytest.mark.parametrize(
    ("main", "size", "made_inside"), [("full_batch", 8, True), ("auto", 4, False)]
)
def test_update_equals_that_of_one_device(mirrored, float64, main, size, made_inside):
    """M = 4; with batches of 4, each sub-batch is one example, and nothing may warn of that."""
    kwargs, fit = {"main_gradient": main}, {"batch_size": size}
    expected, expected_logs = train(ONE_DEVICE, fit=fit, **kwargs)
    plain, _ = train(ONE_DEVICE, keras.Model, fit=fit)
    if not made_inside:
        kwargs = {"regularizer": regularizer(**kwargs)}
    model, logs = train(mirrored, fit=fit, **kwargs)
    difference, contribution = (
        np.linalg.norm(flat(m.weights) - flat(expected.weights)) for m in (model, plain)
    )
    # The contribution is some 1e-2 of the weights: sums in another order are 1e-13 of it.
    assert difference <= 1e-11 * contribution
    np.testing.assert_array_equal(*replicas(model))
    assert list(logs) == list(expected_logs)
    np.testing.assert_allclose(list(logs.values()), list(expected_logs.values()), rtol=1e-11)


def test_update_equals_that_of_one_device_in_float32(mirrored):
    model, _ = train(mirrored, num_sub_batches=2)
    expected, _ = train(ONE_DEVICE, num_sub_batches=2)
    # Rounding is 6e-8 of a weight; three steps, with momentum, and their sums make a dozen of it.
    difference = flat(model.weights) - flat(expected.weights)
    assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(flat(expected.weights))
    np.testing.assert_array_equal(*replicas(model))


@pytest.mark.slow
def test_zero_beta_equals_plain_keras_to_the_bit(mirrored):
    """With batch norm and dropout: all statistics and seeds."""
    model, logs = train(mirrored, outputs=normalized, beta=0.0, num_sub_batches=2)
    plain, plain_logs = train(mirrored, keras.Model, outputs=normalized)
    assert np.isfinite(logs.pop("infomcr_reg")[0])
    assert logs == plain_logs
    np.testing.assert_array_equal(flat(model.variables), flat(plain.variables))


def test_gate_and_live_beta_act_on_all_replicas(mirrored, float64):
    """The first step is plain; the second has twice the coefficient of the third."""
    weights = []

    class Steer(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.regularizer_active = batch > 0
            self.model.regularizer.beta = [0.0, 2 * BETA, BETA][batch]

        def on_train_batch_end(self, batch, logs=None):
            weights.append(flat(self.model.weights))

    values = []
    for strategy in (mirrored, ONE_DEVICE):
        model, logs = train(strategy, fit={"callbacks": [Steer()]}, num_sub_batches=2)
        values.append(logs["infomcr_reg"])
        if strategy is mirrored:
            np.testing.assert_array_equal(*replicas(model))
    np.testing.assert_allclose(weights[:3], weights[3:], rtol=1e-11)
    np.testing.assert_allclose(*values, rtol=1e-11)


@pytest.mark.slow
def test_half_precision_contributes_what_float32_does(mirrored):
    """Replicas are traced in threads of their own, each with its own dtype."""
    contributions = []
    for strategy, policy in ((ONE_DEVICE, "float32"), (mirrored, "mixed_bfloat16")):
        keras.config.set_dtype_policy(policy)
        fit = {"batch_size": 24, "sample_weight": None, "shuffle": False, "verbose": 0}
        model, _ = train(strategy, outputs=gelu, momentum=0.0, num_sub_batches=2, fit=fit)
        assert all(layer.dtype_policy.name == policy for layer in model.layers[:2])
        initial = model.get_weights()
        updated = []
        for beta in (0.0, BETA):
            model.set_weights(initial)
            model.regularizer.beta = beta
            model.fit(X, Y, **fit)
            updated.append(flat(model.weights))
        contributions.append(updated[1] - updated[0])
    expected, got = contributions
    norms = np.linalg.norm(got), np.linalg.norm(expected)
    assert got @ expected >= 0.99 * norms[0] * norms[1]
    np.testing.assert_allclose(*norms, rtol=0.05)
