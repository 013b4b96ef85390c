"""SubBatchPerturbation against a slow reading of Algorithm 1 (InfoMCR), written in NumPy.

Tolerance: everything is float64 and of order one. The difference of two gradients is off by some
1e-15 and multiplied by beta = 10; the contribution that it makes is of order beta * alpha = 0.1.
Relative to it, that is 1e-13 a step, and 1e-10 leaves room for the layers and for three steps.
"""

import functools
import json

import keras
import numpy as np
import pytest
from frameworks import array, numpy, slices

from keras_infomcr import RegularizedModel, regularizers
from keras_infomcr.objective import Objective
from keras_infomcr.regularizers import SubBatchPerturbation

ALPHA, BETA = 0.01, 10.1
RATE, MOMENTUM, PENALTY = 1 / 8, 7 / 8, 1 / 64  # exact in float32, through which Keras takes them


class SoftmaxRegression:
    """Cross-entropy of softmax(x W + b); parameters [W, b]."""

    shapes = ((5, 3), (3,))

    @staticmethod
    def layers(penalty):
        return [keras.layers.Dense(3, kernel_regularizer=penalty)]

    @staticmethod
    def loss_and_gradients(parameters, x, y, sample_weight):
        w, b = parameters
        loss, d_logits = cross_entropy(x @ w + b, y, sample_weight)
        return loss, [x.T @ d_logits, d_logits.sum(0)]


class TwoLayers:
    """Cross-entropy of softmax(tanh(x W + b) V + c); parameters [W, b, V, c]."""

    shapes = ((5, 4), (4,), (4, 3), (3,))

    @staticmethod
    def layers(penalty):
        return [
            keras.layers.Dense(4, "tanh", kernel_regularizer=penalty),
            keras.layers.Dense(3, kernel_regularizer=penalty),
        ]

    @staticmethod
    def loss_and_gradients(parameters, x, y, sample_weight):
        w, b, v, c = parameters
        hidden = np.tanh(x @ w + b)
        loss, d_logits = cross_entropy(hidden @ v + c, y, sample_weight)
        d_hidden = (d_logits @ v.T) * (1 - hidden**2)
        return loss, [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits, d_logits.sum(0)]


def cross_entropy(logits, y, sample_weight):
    """Return the sum of weighted losses over their number, Keras's mean, with its gradient."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(y))
    loss = -(sample_weight * np.log(p[rows, y])).mean()
    p[rows, y] -= 1
    return loss, p * sample_weight[:, None] / len(y)


class Algorithm1:
    """SGD with momentum on L(B, w) + penalties + beta R_alpha(w), a literal reading."""

    def __init__(self, net, parameters, penalty, num_sub_batches):
        self.net = net
        self.parameters = [p.copy() for p in parameters]
        self.velocity = [np.zeros_like(p) for p in parameters]
        self.penalty = penalty
        self.num_sub_batches = num_sub_batches

    def regularizer(self, x, y, sample_weight):
        """Return R_alpha and its gradient."""
        value, gradient = 0.0, [np.zeros_like(p) for p in self.parameters]
        for i in slices(len(x), self.num_sub_batches):
            batch = x[i], y[i], sample_weight[i]
            loss, g = self.net.loss_and_gradients(self.parameters, *batch)
            moved = [p - ALPHA * d for p, d in zip(self.parameters, g)]
            loss_moved, h = self.net.loss_and_gradients(moved, *batch)
            value += len(i) / len(x) * (loss - loss_moved)
            for total, a, b in zip(gradient, g, h):
                total += len(i) / len(x) * (a - b)
        return value, gradient

    def step(self, x, y, sample_weight):
        """Take a step; return the training loss and R_alpha before it."""
        loss, g = self.net.loss_and_gradients(self.parameters, x, y, sample_weight)
        value, r = self.regularizer(x, y, sample_weight)
        for i, p in enumerate(self.parameters):
            if p.ndim == 2:
                loss += self.penalty * (p**2).sum()
                g[i] = g[i] + 2 * self.penalty * p
        for i in range(len(g)):
            self.velocity[i] = MOMENTUM * self.velocity[i] - RATE * (g[i] + BETA * r[i])
            self.parameters[i] = self.parameters[i] + self.velocity[i]
        return loss, value


@pytest.fixture
def data(rng):
    """18 examples, `[18, 5]`, of 3 classes, with weights."""
    x, y = rng.normal(size=(18, 5)), rng.integers(3, size=18)
    return x, y, rng.uniform(0.2, 3, size=18)


def make(net, penalty=0.0, **kwargs):
    kwargs = {"alpha": ALPHA, "beta": BETA, **kwargs}
    x = inputs = keras.Input((5,))
    for layer in net.layers(keras.regularizers.L2(penalty) if penalty else None):
        x = layer(x)
    model = RegularizedModel(inputs, x)
    model.set_weights([np.random.default_rng(1).normal(size=s) for s in net.shapes])
    model.compile(
        keras.optimizers.SGD(RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=SubBatchPerturbation(**kwargs),
    )
    model.optimizer.build(model.trainable_variables)  # else Keras traces the step twice
    return model


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def assert_same_direction(got, expected, tolerance=1e-10):
    got, expected = flat(got), flat(expected)
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


MAIN_GRADIENTS = ["full_batch", "sub_batches", "auto"]
with_net = pytest.mark.parametrize("net", [SoftmaxRegression, TwoLayers])


@with_net
@pytest.mark.parametrize(("size", "count"), [(8, 4), (7, 3), (2, 3), (5, 1), (3, 3)])
@pytest.mark.parametrize("plainly", [True, False], ids=["", "L2-weighted"])
def test_contribution_is_the_gradient_of_algorithm_1(float64, net, data, size, count, plainly):
    penalty = 0.0 if plainly else PENALTY
    x, y, weights = (a[:size] for a in data)
    model = make(net, penalty, num_sub_batches=count)
    batch = [array(a) for a in (x, y, weights)]
    if plainly:
        weights, batch[2] = np.ones(size), None
    result = model.regularizer(Objective(model), batch)
    oracle = Algorithm1(net, model.get_weights(), penalty, count)
    value, gradient = oracle.regularizer(x, y, weights)
    assert_same_direction(result.gradient, gradient)
    np.testing.assert_allclose(result.value, value, rtol=1e-10)


@with_net
@pytest.mark.parametrize("main", MAIN_GRADIENTS)
@pytest.mark.parametrize(("size", "count"), [(7, 2), (2, 3)])
def test_one_step_is_algorithm_1(float64, net, data, size, count, main):
    x, y, weights = (a[:size] for a in data)
    model = make(net, PENALTY, num_sub_batches=count, main_gradient=main)
    before = model.get_weights()
    oracle = Algorithm1(net, before, PENALTY, count)
    loss, _ = oracle.step(x, y, weights)
    logged = model.train_on_batch(x, y, weights)
    update = [a - b for a, b in zip(model.get_weights(), before)]
    assert_same_direction(update, [a - b for a, b in zip(oracle.parameters, before)])
    np.testing.assert_allclose(logged, loss, rtol=1e-10)


@pytest.mark.parametrize(
    ("net", "main"),
    [*((TwoLayers, main) for main in MAIN_GRADIENTS), (SoftmaxRegression, "auto")],
)
@pytest.mark.parametrize("penalty", [0.0, PENALTY], ids=["", "L2"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_three_steps_are_algorithm_1(float64, data, net, main, penalty, weighted):
    """Batches of 7, 7 and 1 examples, M = 2: sub-batches of 4 and 3, and of a single one."""
    x, y, weights = (a[:15] for a in data)
    model = make(net, penalty, num_sub_batches=2, main_gradient=main)
    before = model.get_weights()
    oracle = Algorithm1(net, before, penalty, 2)
    if not weighted:
        weights = np.ones(15)
    batches = [np.arange(15)[s] for s in (slice(0, 7), slice(7, 14), slice(14, 15))]
    losses, values = zip(*(oracle.step(x[i], y[i], weights[i]) for i in batches))
    sample_weight = weights if weighted else None
    history = model.fit(x, y, 7, sample_weight=sample_weight, shuffle=False, verbose=0).history
    update = [a - b for a, b in zip(model.get_weights(), before)]
    assert_same_direction(update, [a - b for a, b in zip(oracle.parameters, before)])
    sizes = [len(i) for i in batches]
    for key, expected in (("loss", losses), ("infomcr_reg", values)):
        np.testing.assert_allclose(history[key], np.average(expected, weights=sizes), rtol=1e-10)


def test_penalties_are_no_part_of_the_regularizer(float64, data):
    results = []
    for penalty in (0.0, 100.0):
        model = make(TwoLayers, penalty, num_sub_batches=2)
        batch = [array(a) for a in data]
        results.append(model.regularizer(Objective(model), batch))
    # No rounding either: the penalties are left out, not subtracted.
    np.testing.assert_array_equal(flat(results[0].gradient), flat(results[1].gradient))
    np.testing.assert_array_equal(results[0].value, results[1].value)


@pytest.mark.parametrize(("main", "tolerance"), [("full_batch", 0.0), ("sub_batches", 1e-13)])
def test_zero_beta_equals_plain_keras(float64, data, main, tolerance):
    """To the bit, or but for sums in another order, a few units of 1e-16 a step."""
    x, y, weights = data
    ours = make(TwoLayers, PENALTY, beta=0.0, num_sub_batches=2, main_gradient=main)
    plain = keras.Model(ours.inputs, ours.outputs)
    initial, trained = ours.get_weights(), []
    for model in (ours, plain):
        model.set_weights(initial)
        if model is plain:
            model.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM), ours.loss)
        history = model.fit(x, y, 7, sample_weight=weights, shuffle=False, verbose=0).history
        trained.append([*model.get_weights(), history["loss"]])
    assert_same_direction(*trained, tolerance)


# The dtype policy


def gelu_network():
    x = inputs = keras.Input((12,))
    for _ in range(2):
        x = keras.layers.Dense(16)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Activation("gelu")(x)
    return RegularizedModel(inputs, keras.layers.Dense(4, dtype="float32")(x))


class GeluNetwork(RegularizedModel):
    """Has weights of its own, which only the autocast of `__call__` brings to half precision."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(16)
        self.normalization = keras.layers.BatchNormalization()

    def build(self, shape):
        self.kernel = self.add_weight((16, 4), "glorot_uniform")
        self.dense.build(shape)
        self.normalization.build((shape[0], 16))

    def call(self, x):
        x = keras.activations.gelu(self.normalization(self.dense(x)))
        return keras.ops.cast(x @ keras.ops.cast(self.kernel, x.dtype), "float32")


@functools.cache
def contributions(build, policy):
    """Return the contribution as the regulariser gives it, and as a training step shows it."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(32, 12)).astype("float32"), generator.integers(4, size=32)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = build()
    model.build((None, 12))
    model.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=SubBatchPerturbation(num_sub_batches=2),
    )
    given = flat(model.regularizer(Objective(model), (array(x), array(y), None)).gradient)
    initial, trained = model.get_weights(), []
    for beta in (0.0, 100.0):
        model.set_weights(initial)
        model.regularizer.beta = beta
        before = flat(model.trainable_variables)
        model.train_on_batch(x, y)
        trained.append(flat(model.trainable_variables))
        assert np.abs(trained[-1] - before).max() > 1e-3, "the step was skipped"
    return given, (trained[0] - trained[1]) / 100


@pytest.mark.slow
@pytest.mark.parametrize("build", [gelu_network, GeluNetwork])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_contributes_what_float32_does(build, policy):
    expected, expected_step = contributions(build, "float32")
    # A weight of order one keeps 1e-7 of a contribution of some 1e-3: a thousandth of it.
    assert np.linalg.norm(expected_step - expected) < 0.01 * np.linalg.norm(expected)
    for got in contributions(build, policy):
        norms = np.linalg.norm(got), np.linalg.norm(expected)
        assert got @ expected >= 0.99 * norms[0] * norms[1]
        np.testing.assert_allclose(*norms, rtol=0.05)


def test_dtype_policy_is_left_as_it_was():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = gelu_network()
    policies = [layer.dtype_policy for layer in model.layers]
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    model.train_on_batch(np.ones((4, 12)), np.ones((4, 4)))
    assert [layer.dtype_policy for layer in model.layers] == policies
    assert all(a.dtype_policy is b for a, b in zip(model.layers, policies))
    outputs = model.layers[1](np.ones((1, 12)))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


def test_overflow_skips_the_step_as_in_plain_keras(rng):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = rng.normal(size=(8, 12)).astype("float32"), rng.integers(4, size=8)
    model = gelu_network()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**40)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, regularizer=SubBatchPerturbation(num_sub_batches=2))
    before = flat(model.trainable_variables)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(flat(model.trainable_variables), before)
    assert float(optimizer.dynamic_scale) == 2.0**39


# Dropout: with a loss that is linear in the weights, the gradient depends on the masks alone.


class LinearLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.sum(y_pred, axis=-1)


def linear_model(**kwargs):
    inputs = keras.Input((30,))
    x = keras.layers.Dropout(0.5)(inputs)
    x = keras.layers.GaussianNoise(1.0)(x)
    model = RegularizedModel(inputs, keras.layers.Dense(2)(x))
    regularizer = SubBatchPerturbation(alpha=0.5, beta=1e6, num_sub_batches=3)
    model.compile(keras.optimizers.SGD(0.1), LinearLoss(), regularizer=regularizer, **kwargs)
    return model


def test_both_evaluations_of_a_pair_draw_the_same_numbers(rng):
    model = linear_model()
    model.regularizer.main_gradient = "sub_batches"
    x = array(rng.normal(size=(6, 30)), "float32")
    result = model.regularizer(Objective(model), (x, array(np.zeros((6, 2)), "float32"), None))
    # g is the mean of x under its mask, whatever w: equal masks make the difference exactly 0.
    np.testing.assert_array_equal(flat(result.gradient), 0)
    assert np.linalg.norm(flat(result.loss_gradient)) > 1
    assert float(result.value) > 1  # alpha times the mean of ||g_i||^2


def test_sub_batches_draw_numbers_of_their_own():
    model = linear_model()
    model.regularizer.main_gradient = "sub_batches"
    x = array(np.ones((6, 30)), "float32")
    result = model.regularizer(Objective(model), (x, array(np.zeros((6, 2)), "float32"), None))
    first, second, third = map(numpy, result.predictions)
    assert not np.allclose(first, second) and not np.allclose(second, third)


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_same_numbers_are_drawn_within_a_training_step(rng, mode):
    x, y = rng.normal(size=(6, 30)).astype("float32"), np.zeros((6, 2), "float32")
    model = linear_model(**mode)
    initial = [v.numpy() for v in model.variables]  # seeds too
    trained = []
    for beta in (0.0, 1e6):
        keras.utils.set_random_seed(0)
        for variable, value in zip(model.variables, initial):
            variable.assign(value)
        model.regularizer.beta = beta
        model.train_on_batch(x, y)
        trained.append(flat(model.trainable_variables))
    # Masks that differ would add some 1e5. XLA may round the two gradients differently.
    np.testing.assert_allclose(trained[1], trained[0], atol=0.2 if "jit_compile" in mode else 0)


def test_evaluations_leave_no_trace(rng):
    inputs = keras.Input((30,))
    x = keras.layers.Dense(4)(keras.layers.Dropout(0.5)(inputs))
    model = RegularizedModel(inputs, keras.layers.BatchNormalization()(x))
    regularizer = SubBatchPerturbation(num_sub_batches=2)
    model.compile("sgd", "mse", metrics=["mae"], regularizer=regularizer)
    x = rng.normal(size=(6, 30)).astype("float32")
    model.train_on_batch(x, np.ones((6, 4)))
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    before = [v.numpy() for v in variables]
    result = model.regularizer(
        Objective(model), (array(x), array(np.ones((6, 4)), "float32"), None)
    )
    assert np.isfinite(flat(result.gradient)).all()
    for value, variable in zip(before, variables):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)


# Where the main gradient comes from


def dense(inputs):
    return keras.layers.Dense(3)(inputs)


def of_layer(*layers):
    def outputs(inputs):
        for layer in (*layers, keras.layers.Dense(3)):
            inputs = layer() if inputs is None else layer(inputs)
        return inputs

    return outputs


def centred(x):
    return x - keras.ops.mean(x, axis=0)


class Overridden(RegularizedModel):
    def call(self, inputs, training=None, mask=None):
        return centred(super().call(inputs))


def frozen_normalization(inputs):
    layer = keras.layers.BatchNormalization()
    layer.trainable = False
    return dense(layer(inputs))


def nested(inputs):
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "tanh")])
    return dense(inner(inputs))


def main_gradient_of(outputs, loss="mse", base=RegularizedModel, **kwargs):
    inputs = keras.Input((5,))
    model = base(inputs, outputs(inputs))
    model.compile("sgd", loss, regularizer=SubBatchPerturbation(num_sub_batches=2, **kwargs))
    return model.regularizer.gives_main_gradient(model)


@pytest.mark.parametrize(
    "outputs",
    [
        dense,
        nested,
        frozen_normalization,
        lambda x: of_layer(keras.layers.LayerNormalization())(x),
        lambda x: keras.layers.Add()([dense(x), dense(x)]),
        lambda x: keras.layers.Dense(3, "gelu", kernel_regularizer="l2")(x),
    ],
    ids=["dense", "nested", "frozen batch norm", "layer norm", "branches", "penalty"],
)
def test_sub_batches_give_the_main_gradient_where_no_layer_couples_examples(outputs):
    assert main_gradient_of(outputs)
    assert not main_gradient_of(outputs, main_gradient="full_batch")


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: of_layer(keras.layers.BatchNormalization())(x),
        lambda x: of_layer(keras.layers.Dropout(0.5))(x),
        lambda x: of_layer(keras.layers.Masking())(x),
        lambda x: of_layer(keras.layers.Softmax(axis=0))(x),
        lambda x: of_layer(keras.layers.UnitNormalization(axis=0))(x),
        lambda x: of_layer(keras.layers.LayerNormalization(axis=0, center=False, scale=False))(x),
        lambda x: of_layer(keras.layers.Activation(centred))(x),
        lambda x: keras.layers.Dense(3, activation=centred)(x),
        lambda x: dense(x) - keras.ops.mean(x),
        lambda x: of_layer(keras.layers.Lambda(centred))(x),
        lambda x: keras.layers.Dense(3, activity_regularizer="l2")(x),
    ],
    ids=[
        "batch norm", "dropout", "mask", "softmax over the batch", "unit norm over the batch",
        "layer norm over the batch", "custom activation", "custom activation in a layer",
        "operation", "lambda", "activity",
    ],
)  # fmt: skip
def test_full_batch_gives_the_main_gradient_where_a_layer_couples_examples(outputs):
    assert not main_gradient_of(outputs)


def centred_loss(y_true, y_pred):
    return keras.ops.square(centred(y_true - y_pred))


class Centred(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return centred_loss(y_true, y_pred)


@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        "MeanSquaredError",
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.CosineSimilarity(),
        keras.losses.Huber(delta=0.5, reduction="mean"),
        keras.losses.BinaryFocalCrossentropy(apply_class_balancing=True),
    ],
    ids=lambda loss: getattr(loss, "name", loss),
)
def test_sub_batches_give_the_main_gradient_of_losses_of_single_examples(loss):
    assert main_gradient_of(dense, loss)


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.MeanSquaredError(reduction="sum"),
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        "dice",
        keras.losses.Tversky(),
        keras.losses.Circle(),
        keras.losses.SparseCategoricalCrossentropy(ignore_class=-1),
        keras.losses.CosineSimilarity(axis=0),
        keras.losses.BinaryCrossentropy(axis=0),
        centred_loss,
        Centred(),
        ["mse", keras.losses.SparseCategoricalCrossentropy(ignore_class=0)],
    ],
    ids=[
        "sum", "mean with sample weight", "dice", "tversky", "circle", "ignored class",
        "cosine over the batch", "cross-entropy over the batch", "custom", "custom class",
        "one of two",
    ],
)  # fmt: skip
def test_full_batch_gives_the_main_gradient_where_the_loss_is_no_mean_over_examples(loss):
    assert not main_gradient_of(dense, loss)


def test_unlabelled_examples_do_not_change_the_main_gradient(float64, rng):
    """The step is plain Keras's where beta is 0, whatever sub-batches the labels fall in."""
    x, y = rng.normal(size=(8, 5)), np.array([0, 1, -1, 2, -1, -1, -1, 1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    weights = []
    for base, kwargs in ((keras.Model, {}), (RegularizedModel, {"regularizer": zero_beta()})):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        model = base(inputs, dense(inputs))
        model.compile(keras.optimizers.SGD(RATE), loss, **kwargs)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        weights.append(flat(model.get_weights()))
    # One step, compiled twice: rounding of float64.
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-14)


def zero_beta():
    return SubBatchPerturbation(beta=0.0, num_sub_batches=2)


def test_full_batch_gives_the_main_gradient_of_an_overridden_call():
    assert not main_gradient_of(dense, base=Overridden)


def test_full_batch_gives_the_main_gradient_of_a_subclass():
    assert not make_subclassed().regularizer.gives_main_gradient(make_subclassed())


def make_subclassed():
    model = GeluNetwork()
    model.compile("sgd", "mse")
    return model


def test_sub_batches_on_request_average_the_statistics_of_sub_batches(float64, rng):
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    inputs = keras.Input((5,))
    model = RegularizedModel(inputs, keras.layers.BatchNormalization(momentum=0.9)(inputs))
    regularizer = SubBatchPerturbation(num_sub_batches=2, main_gradient="sub_batches")
    model.compile("sgd", "mse", regularizer=regularizer)
    model.train_on_batch(x, y)
    parts = [x[:3], x[3:]]
    means = np.average([p.mean(0) for p in parts], axis=0, weights=[3, 4])
    variances = np.average([p.var(0) for p in parts], axis=0, weights=[3, 4])
    moving_mean, moving_variance = model.non_trainable_variables
    np.testing.assert_allclose(moving_mean, 0.1 * means, rtol=1e-12)
    np.testing.assert_allclose(moving_variance, 0.9 + 0.1 * variances, rtol=1e-12)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"alpha": v}, "`alpha` must be a finite number greater than 0. Received: alpha=")
          for v in (0, -1e-4, float("nan"), float("inf"), "1e-4", True, None)),
        *(({"beta": v}, "`beta` must be a finite number, 0 or greater. Received: beta=")
          for v in (-1, float("nan"), float("inf"), "10", None)),
        *(({"num_sub_batches": v}, "`num_sub_batches` must be an integer of at least 1. Received: ")
          for v in (0, -2, 2.5, "8", True, None)),
        *(({"main_gradient": v},
           "`main_gradient` must be one of 'auto', 'full_batch', 'sub_batches'. Received: ")
          for v in ("full", None)),
        *(({"estimator": v},
           "`estimator` must be one of 'finite_difference', 'hessian_vector_product'. Received: ")
          for v in ("hessian", None)),
    ],
    ids=str,
)  # fmt: skip
def test_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubBatchPerturbation(**arguments)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_live_beta_out_of_range_keeps_the_old_one(value):
    regularizer = SubBatchPerturbation(beta=3.0)
    with pytest.raises(ValueError, match=r"must be a finite number, 0 or greater\. Received: .*="):
        regularizer.beta = value
    assert float(regularizer.beta) == 3.0


def test_unknown_argument():
    with pytest.raises(TypeError, match="num_perturbations"):
        SubBatchPerturbation(num_perturbations=2)


@pytest.mark.parametrize(
    "value", ["bogus", 3, keras.regularizers.L2()], ids=lambda v: type(v).__name__
)
def test_compile_refuses_what_is_no_regularizer(value):
    model = gelu_network()
    message = r"`regularizer` must be a `Regularizer` instance, `None` or one of .*Received: regu"
    with pytest.raises(ValueError, match=message):
        model.compile("sgd", "mse", regularizer=value)
    assert not model.compiled


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_sub_batches_of_a_loss_that_is_no_mean_are_refused(reduction, data):
    model = make(SoftmaxRegression, main_gradient="sub_batches")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile("sgd", loss, regularizer=model.regularizer)
    before = model.get_weights()
    with pytest.raises(ValueError, match='Use `main_gradient="full_batch"`'):
        model.fit(*data[:2], verbose=0)
    np.testing.assert_array_equal(flat(model.get_weights()), flat(before))


def test_sub_batches_of_stateful_layers_are_refused():
    inputs = keras.Input(batch_shape=(2, 3, 1))
    model = RegularizedModel(inputs, keras.layers.LSTM(2, stateful=True)(inputs))
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(main_gradient="sub_batches"))
    with pytest.raises(ValueError, match="Stateful recurrent layers must see whole batches"):
        model.train_on_batch(np.ones((2, 3, 1)), np.ones((2, 2)))


def test_half_precision_weights_are_refused():
    keras.config.set_dtype_policy("float16")
    model = gelu_network()
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    before = model.get_weights()
    message = r"Weights must be float32 or float64.*Received: half-precision weights \['dense/kern"
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(np.ones((4, 12)), np.ones((4, 4)))
    np.testing.assert_array_equal(flat(model.get_weights()), flat(before))


# Serialisation


CONFIG = {
    "alpha": 0.3,
    "beta": 0.1,
    "num_sub_batches": 5,
    "main_gradient": "full_batch",
    "num_perturbed": 3,
    "estimator": "hessian_vector_product",
}


def test_defaults_are_those_of_the_paper():
    assert SubBatchPerturbation().get_config() == {
        "alpha": 1e-4,
        "beta": 10.0,
        "num_sub_batches": 8,
        "main_gradient": "auto",
        "num_perturbed": None,
        "estimator": "finite_difference",
    }


def test_config_makes_an_equal_regularizer():
    config = SubBatchPerturbation(**CONFIG).get_config()
    assert config == CONFIG
    assert SubBatchPerturbation.from_config(config).get_config() == CONFIG


def test_config_holds_the_live_beta():
    regularizer = SubBatchPerturbation(**CONFIG)
    regularizer.beta = 0.7
    assert regularizer.get_config() == {**CONFIG, "beta": 0.7}
    assert float(regularizer.strength.numpy()) == pytest.approx(0.7, rel=1e-7)  # float32 on JAX


@pytest.mark.parametrize("number", [float, np.float64, np.float32, np.float16])
def test_serialised_form_is_json(number):
    regularizer = SubBatchPerturbation(number(0.5), number(2), np.int64(4))
    serialised = json.loads(json.dumps(keras.saving.serialize_keras_object(regularizer)))
    assert serialised["registered_name"] == "keras_infomcr>SubBatchPerturbation"
    loaded = keras.saving.deserialize_keras_object(serialised)
    assert isinstance(loaded, SubBatchPerturbation)
    assert loaded.get_config() == regularizer.get_config()


def test_get():
    regularizer = SubBatchPerturbation(**CONFIG)
    assert regularizers.get(regularizer) is regularizer
    assert regularizers.get(None) is None
    by_name = regularizers.get("sub_batch_perturbation")
    assert by_name.get_config() == SubBatchPerturbation().get_config()
    serialised = keras.saving.serialize_keras_object(regularizer)
    assert regularizers.get(serialised).get_config() == CONFIG


@pytest.mark.parametrize("value", ["bogus", 3, SubBatchPerturbation, [SubBatchPerturbation()]])
def test_get_of_something_else(value):
    with pytest.raises(ValueError, match="Received: regularizer="):
        regularizers.get(value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"alpha": 1e-4},
        keras.saving.serialize_keras_object(keras.regularizers.L2()),
    ],
    ids=["empty", "arguments alone", "of a weight penalty"],
)
def test_get_of_a_dictionary_that_is_no_regularizer(value):
    with pytest.raises(ValueError, match=r"or one of \['sub_batch_perturbation'\]\. Received: reg"):
        regularizers.get(value)


def test_the_class_in_place_of_an_instance():
    message = r"Pass an instance of the class, `SubBatchPerturbation\(\.\.\.\)`"
    with pytest.raises(ValueError, match=message):
        gelu_network().compile("sgd", "mse", regularizer=SubBatchPerturbation)


def test_repr_shows_the_arguments():
    shown = repr(SubBatchPerturbation(**CONFIG))
    assert eval(shown).get_config() == CONFIG
    regularizer = SubBatchPerturbation()
    regularizer.beta = 20.0
    assert repr(regularizer).startswith("SubBatchPerturbation(alpha=0.0001, beta=20.0, num_sub")


def test_left_out_is_the_default_regularizer():
    model = gelu_network()
    model.compile("sgd", "mse")
    assert model.regularizer.get_config() == SubBatchPerturbation().get_config()
