"""Training under `tf.distribute.MirroredStrategy`, on two logical CPU devices."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.callbacks import RegularizationSchedule
from keras_infomcr.regularizers import SubBatchPerturbation

if BACKEND != "tensorflow":
    pytest.skip("`tf.distribute` is a part of TensorFlow.", allow_module_level=True)

import tensorflow as tf

BETA = 5.0

draw = np.random.default_rng(0)
X = draw.normal(size=(24, 4)).astype("float32")
Y = draw.normal(size=(24, 2)).astype("float32")
WEIGHTS = draw.uniform(0.2, 3, size=24).astype("float32")


def network(activation="tanh", *layers):
    penalty = keras.regularizers.L2(1 / 64)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, activation, kernel_regularizer=penalty)(inputs)
    for layer in layers:
        x = layer(x)
    return inputs, keras.layers.Dense(2, dtype=keras.config.floatx())(x)


def gelu():
    return network("gelu")


def normalized():
    return network("tanh", keras.layers.BatchNormalization(), keras.layers.Dropout(0.25))


def normalized_by_replica():
    return network("tanh", keras.layers.BatchNormalization())


def synchronized():
    return network("tanh", keras.layers.BatchNormalization(synchronized=True))


def regularizer(beta=BETA, num_sub_batches=4, **kwargs):
    return SubBatchPerturbation(0.05, beta, num_sub_batches, **kwargs)


def train(
    strategy,
    base=RegularizedModel,
    outputs=network,
    fit=None,
    momentum=0.5,
    num_examples=24,
    eagerly=False,
    **kwargs,
):
    """Train for an epoch of batches of 8; return the model and its logs.

    Args:
        strategy: The `tf.distribute.Strategy`.
        base: `RegularizedModel` or `keras.Model`.
        outputs: Function that returns the inputs and outputs of the model.
        fit: Other arguments of `fit`.
        momentum: Float, of the optimizer.
        num_examples: Integer, the length of the epoch.
        eagerly: Boolean, whether the steps run without tracing, as they may on one device, where
            it takes less time and the same numbers are computed, to rounding.
        **kwargs: Of `regularizer`, or the regulariser itself.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = base(*outputs())
        if base is RegularizedModel and "regularizer" not in kwargs:
            kwargs = {"regularizer": regularizer(**kwargs)}
        # Numbers exact in float32, through which Keras takes them.
        optimizer = keras.optimizers.SGD(1 / 8, momentum=momentum)
        model.compile(optimizer, "mse", weighted_metrics=["mae"], run_eagerly=eagerly, **kwargs)
    rows = slice(num_examples)
    fit = {"sample_weight": WEIGHTS[rows], "batch_size": 8, "shuffle": False} | (fit or {})
    return model, model.fit(X[rows], Y[rows], verbose=0, **fit).history


def flat(variables):
    return np.concatenate([np.ravel(v.numpy()) for v in variables]).astype("float64")


def assert_same(model, expected):
    """Compare in float64, where sums in another order are 1e-16 of a weight, many times."""
    norm = np.linalg.norm(flat(expected.weights))
    np.testing.assert_allclose(
        flat(model.weights), flat(expected.weights), rtol=0, atol=1e-12 * norm
    )


def replicas(model):
    """Return weights and optimizer as each replica holds them."""
    values = [v.value.values for v in [*model.trainable_weights, *model.optimizer.variables]]
    return [np.concatenate([np.ravel(a[i].numpy()) for a in values]) for i in range(2)]


ONE_DEVICE = tf.distribute.get_strategy()


@pytest.mark.parametrize(
    ("main", "size", "made_inside"),
    [("full_batch", 8, True), pytest.param("auto", 4, False, marks=pytest.mark.slow)],
)
def test_update_equals_that_of_one_device(mirrored, float64, main, size, made_inside):
    """There are four sub-batches. In batches of four, each is one example, which must not warn."""
    kwargs, fit = {"main_gradient": main}, {"batch_size": size}
    expected, expected_logs = train(ONE_DEVICE, fit=fit, eagerly=True, **kwargs)
    plain, _ = train(ONE_DEVICE, keras.Model, fit=fit, eagerly=True)
    if not made_inside:
        kwargs = {"regularizer": regularizer(**kwargs)}
    model, logs = train(mirrored, fit=fit, **kwargs)
    difference, contribution = (
        np.linalg.norm(flat(m.weights) - flat(expected.weights)) for m in (model, plain)
    )
    # The contribution is some 1e-2 of the weights. Sums in another order change the weights by
    # 1e-15 of them, which is 1e-13 of the contribution.
    assert difference <= 1e-11 * contribution
    np.testing.assert_array_equal(*replicas(model))
    assert list(logs) == list(expected_logs)
    np.testing.assert_allclose(list(logs.values()), list(expected_logs.values()), rtol=1e-11)


@pytest.mark.slow
def test_update_equals_that_of_one_device_in_float32(mirrored):
    model, _ = train(mirrored, num_sub_batches=2)
    expected, _ = train(ONE_DEVICE, num_sub_batches=2, eagerly=True)
    # Float32 rounds a weight by 6e-8 of it. Three steps with momentum round a dozen times.
    difference = flat(model.weights) - flat(expected.weights)
    assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(flat(expected.weights))
    np.testing.assert_array_equal(*replicas(model))


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"main_gradient": "full_batch"}, marks=pytest.mark.slow),
        pytest.param({"main_gradient": "sub_batches"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "hessian_vector_product"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_synchronized_batch_normalization_equals_that_of_one_device(mirrored, float64, kwargs):
    """As on one device, the whole batch is normalised together and each sub-batch by itself."""
    model, logs = train(mirrored, outputs=synchronized, **kwargs)
    expected, expected_logs = train(ONE_DEVICE, outputs=synchronized, eagerly=True, **kwargs)
    plain, _ = train(ONE_DEVICE, keras.Model, outputs=synchronized, eagerly=True)
    difference, contribution = (
        np.linalg.norm(flat(m.weights) - flat(expected.weights)) for m in (model, plain)
    )
    # As above, but Keras computes the variance as a difference of means, which costs a digit.
    assert difference <= 1e-10 * contribution
    np.testing.assert_allclose(list(logs.values()), list(expected_logs.values()), rtol=1e-10)


@pytest.mark.slow
def test_slices_of_uneven_sizes_are_those_of_one_device(mirrored, float64):
    """Six examples are cut into slices of 1, 2, 1 and 2 examples."""
    fit = {"batch_size": 6}
    model, _ = train(mirrored, fit=fit)
    expected, _ = train(ONE_DEVICE, fit=fit, eagerly=True)
    assert_same(model, expected)


@pytest.mark.slow
def test_uneven_batch_differs_from_one_device_as_in_keras(mirrored, float64):
    """One replica takes 4 of the last 7 examples; Keras weights both replicas equally.

    The regulariser gives a tenth of the update.
    """
    (ours, ours_on_one), (plain, plain_on_one) = (
        [flat(train(s, base, num_examples=23, **kw)[0].weights) for s in (mirrored, ONE_DEVICE)]
        for base, kw in ((RegularizedModel, {"beta": 0.5}), (keras.Model, {}))
    )
    contribution = (ours - plain) - (ours_on_one - plain_on_one)
    assert 0 < np.linalg.norm(contribution) <= np.linalg.norm(plain - plain_on_one)


@pytest.mark.slow
def test_replica_left_without_examples_adds_nothing(mirrored, float64):
    """Only one replica has the one example of the last batch. As in Keras, it counts half."""
    model, logs = train(mirrored, num_examples=17, momentum=0.0)
    before, _ = train(mirrored, num_examples=16, momentum=0.0)
    expected, _ = train(ONE_DEVICE, num_examples=17, momentum=0.0)
    assert np.isfinite(list(logs.values())).all()
    last, expected = (flat(m.weights) - flat(before.weights) for m in (model, expected))
    penalized = before.weights[0].shape.num_elements()  # the penalty is not halved
    np.testing.assert_allclose(2 * last[penalized:], expected[penalized:], atol=1e-12)


@pytest.mark.slow
def test_mean_over_drawn_sub_batches_is_that_of_all(mirrored, float64):
    """At a learning rate of 0 the weights stay; an epoch is one step and logs one draw.

    Layers that synchronise replicas may be in what is drawn.
    """

    def values(**kwargs):
        fit = {"epochs": 8, "callbacks": [keras.callbacks.LearningRateScheduler(lambda _: 0.0)]}
        return train(mirrored, outputs=synchronized, fit=fit, num_examples=8, **kwargs)[1][
            "infomcr_reg"
        ]

    drawn = np.unique(np.round(values(num_perturbed=2), 12))
    assert len(drawn) == 2  # of the two slices of each replica one or the other
    np.testing.assert_allclose(np.mean(drawn), values()[0], rtol=1e-10)


@pytest.mark.parametrize(("asked", "made"), [(1, 2), pytest.param(5, 4, marks=pytest.mark.slow)])
def test_each_replica_takes_as_many_sub_batches(mirrored, float64, asked, made):
    with pytest.warns(
        UserWarning, match=f"`num_sub_batches={asked}` is not divisible by 2 .* {made} in total"
    ):
        model, _ = train(mirrored, num_sub_batches=asked)
    expected, _ = train(ONE_DEVICE, num_sub_batches=made, eagerly=True)
    assert_same(model, expected)


@pytest.mark.slow
def test_replicas_stay_the_same_to_the_bit(mirrored):
    model, logs = train(mirrored, outputs=normalized, fit={"epochs": 17}, beta=0.5)
    assert model.optimizer.iterations.numpy() == 51
    assert np.isfinite(logs["infomcr_reg"][-1])
    np.testing.assert_array_equal(*replicas(model))


@pytest.mark.slow
@pytest.mark.parametrize("act", [True, False])
def test_overflow_on_one_replica_skips_the_step_on_all(mirrored, act):
    """The last example, which the second replica sees, overflows float16."""
    keras.config.set_dtype_policy("mixed_float16")
    with mirrored.scope():
        model = RegularizedModel(*network("linear"))
        model.compile(keras.optimizers.SGD(1 / 8, momentum=0.5), "mse", regularizer=regularizer())
    model.regularizer_active = act
    # `train_on_batch` would not do: it hands each replica the whole batch.
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    x = X[:8].copy()
    model.fit(x, Y[:8], **fit)
    before, scale = flat(model.weights), float(model.optimizer.dynamic_scale.numpy())
    x[-1] = 2000.0
    model.fit(x, Y[:8], **fit)
    np.testing.assert_array_equal(flat(model.weights), before)
    assert float(model.optimizer.dynamic_scale.numpy()) == scale / 2
    model.fit(X[:8], Y[:8], **fit)
    assert np.all(np.isfinite(flat(model.weights))) and np.any(flat(model.weights) != before)
    np.testing.assert_array_equal(*replicas(model))


@pytest.mark.slow
def test_zero_beta_equals_plain_keras_to_the_bit(mirrored):
    """Batch normalisation and dropout are among the layers: their state must agree as well."""
    model, logs = train(mirrored, outputs=normalized, beta=0.0, num_sub_batches=2)
    plain, plain_logs = train(mirrored, keras.Model, outputs=normalized)
    assert np.isfinite(logs.pop("infomcr_reg")[0])
    assert logs == plain_logs
    np.testing.assert_array_equal(flat(model.variables), flat(plain.variables))


@pytest.mark.slow
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
@pytest.mark.parametrize("half", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_contributes_what_float32_does(mirrored, half):
    """Replicas are traced in threads of their own, each with its own dtype."""
    contributions, initial = [], None
    for strategy, policy in ((ONE_DEVICE, "float32"), (mirrored, half)):
        keras.config.set_dtype_policy(policy)
        fit = {"batch_size": 24, "sample_weight": None, "shuffle": False}
        model, _ = train(strategy, outputs=gelu, momentum=0.0, num_sub_batches=2, fit=fit)
        assert all(layer.dtype_policy.name == policy for layer in model.layers[:2])
        initial = initial or model.get_weights()
        updated = []
        for beta in (0.0, BETA):
            model.set_weights(initial)
            model.regularizer.beta = beta
            model.fit(X, Y, verbose=0, **fit)
            updated.append(flat(model.weights))
        contributions.append(updated[1] - updated[0])
    expected, got = contributions
    # Float32 rounds weights of order one to 1e-7, and the contribution is some hundredths of them.
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)


class DropRate(keras.callbacks.Callback):
    """Lower the learning rate for good before the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 1 / 8 if epoch < 1 else 1 / 16


class Stop(keras.callbacks.Callback):
    """Interrupt the training in mid-epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == 7:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
def test_interrupted_run_resumes_to_the_same_trajectory(mirrored, float64, tmp_path):
    """The interruption comes in the third epoch, after the gate has opened at a lower rate."""

    def callbacks(*more):
        return [
            DropRate(),
            StartRegAfterLRDrop(),
            RegularizationSchedule(lambda epoch: [0.0, 1.0, 2.0, 4.0][epoch]),
            GammaHatCallback((X, Y), num_examples=8, num_trials=2),
            keras.callbacks.BackupAndRestore(tmp_path),
            *more,
        ]

    def run(strategy, *more):
        fit = {"epochs": 4, "callbacks": callbacks(*more)}
        return train(strategy, fit=fit, outputs=synchronized)

    with pytest.raises(InterruptedError):
        run(mirrored, Stop())
    model, logs = run(mirrored)
    assert len(logs["loss"]) == 2
    expected, expected_logs = run(ONE_DEVICE)
    assert_same(model, expected)
    assert np.isnan(expected_logs["infomcr_reg"][0])
    for name, values in logs.items():
        np.testing.assert_allclose(values, expected_logs[name][2:], rtol=1e-9, err_msg=name)
    np.testing.assert_array_equal(*replicas(model))


@pytest.mark.slow
def test_strategy_of_one_device_is_no_strategy(float64):
    model, _ = train(tf.distribute.MirroredStrategy(["CPU:0"]), outputs=synchronized)
    expected, _ = train(ONE_DEVICE, outputs=synchronized)
    assert_same(model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [24, 23], ids=["even", "uneven"])
def test_first_pass_of_one_slice_a_replica_is_the_training_pass(mirrored, float64, num_examples):
    """There are as many sub-batches as replicas, and each replica normalises its own share."""
    options = {
        "outputs": normalized_by_replica, "num_sub_batches": 2, "num_examples": num_examples
    }  # fmt: skip
    model, logs = train(mirrored, **options)
    assert model.regularizer.replaces_main_pass(model)
    expected, expected_logs = train(mirrored, main_gradient="full_batch", **options)
    assert_same(model, expected)  # moving statistics included
    np.testing.assert_allclose(list(logs.values()), list(expected_logs.values()), rtol=1e-11)


@pytest.mark.parametrize(
    ("outputs", "num_sub_batches", "known"),
    [
        (normalized_by_replica, 2, True),
        (normalized_by_replica, 4, False),
        (synchronized, 2, False),  # the training pass normalises both shares together
        (normalized, 2, False),  # dropout draws once more for the regulariser
        (network, 4, True),
    ],
)
def test_sub_batches_are_the_training_pass_where_replicas_see_one(
    mirrored, outputs, num_sub_batches, known
):
    with mirrored.scope():
        model = RegularizedModel(*outputs())
        model.compile("sgd", "mse", regularizer=regularizer(num_sub_batches=num_sub_batches))
    assert model.regularizer.replaces_main_pass(model) == known
