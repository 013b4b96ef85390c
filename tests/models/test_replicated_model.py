"""Replicated-SGD: against closed forms, plain models trained on the shares, and NumPy."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_allclose, assert_array_equal, numpy, only_on, slices
from parameters import with_slow

from keras_infomcr.flatness import reestimate_batch_norm
from keras_infomcr.models import ReplicatedModel

draw = np.random.default_rng(0)
X = draw.normal(size=(24, 4)).astype("float32")
Y = draw.normal(size=(24, 2)).astype("float32")
LABELS = draw.integers(3, size=24)
WEIGHTS = draw.uniform(0.2, 3, size=24).astype("float32")
TOKENS = draw.integers(4, size=(24, 5))  # 0 is masked
EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def sgd(rate=1 / 8, **kwargs):  # exact in float32
    return keras.optimizers.SGD(rate, **kwargs)


def linear():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))


def network(*layers, activity="l2"):
    penalty = keras.regularizers.L2(1 / 64)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, "tanh", kernel_regularizer=penalty)(inputs)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, keras.layers.Dense(2, activity_regularizer=activity)(x))


def normalized():
    return network(keras.layers.BatchNormalization(momentum=0.75))


def random():
    return network(keras.layers.BatchNormalization(), keras.layers.Dropout(0.25))


def classifier():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])


def two_in_two_out():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    x = keras.layers.Dense(5, "tanh")(keras.layers.Concatenate()([a, b]))
    c = keras.layers.Dense(3, "softmax", name="c")(x)
    return keras.Model({"a": a, "b": b}, {"c": c, "d": keras.layers.Dense(2, name="d")(x)})


def masked():
    inputs = keras.Input((5,))
    x = keras.layers.Embedding(4, 3, mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


@keras.saving.register_keras_serializable("tests_of_replicas")
class Subclass(keras.Model):
    def __init__(self, units=5):
        super().__init__()
        self.units = units
        self.hidden = keras.layers.Dense(units, "tanh")
        self.out = keras.layers.Dense(2)

    def build(self, input_shape):
        self.hidden.build(input_shape)
        self.out.build((None, self.units))

    def call(self, x, training=False):
        return self.out(self.hidden(x) * (2.0 if training else 1.0))

    def get_config(self):
        return {"units": self.units}


def subclass():
    model = Subclass()
    model.build((None, 4))
    return model


def flat(variables):
    return np.concatenate([numpy(keras.ops.copy(v)).ravel() for v in variables])


def weights_of(model):
    """Return the trainable weights of the replicas: `[y, W]`, float64."""
    return np.stack([flat(r.trainable_variables) for r in model.replicas]).astype("float64")


def copied(model):
    """Return a plain model in the same state, seeds included."""
    twin = keras.models.clone_model(model)
    for variable, value in zip(twin.variables, model.variables):
        variable.assign(keras.ops.copy(value))
    return twin


@pytest.mark.parametrize("coupling", with_slow([0.5, 4096.0], 4096.0))
def test_on_a_quadratic_the_centre_is_plain_descent_and_distances_shrink(float64, coupling):
    """With the second coupling 2 lr g = 1024: an explicit force is unstable above 2."""
    x, y = X[:6].astype("float64"), Y[:6, :1].astype("float64")
    model = ReplicatedModel(linear(), 3, coupling=coupling, growth=1.0)
    model.compile(sgd(), "mse", **EAGER)
    start = weights_of(model)
    # All three shares hold the same six examples.
    logs = model.fit(np.tile(x, (3, 1)), np.tile(y, (3, 1)), 18, epochs=5, shuffle=False, verbose=0)
    hessian, optimum = x.T @ x / 3, np.linalg.lstsq(x, y, rcond=None)[0][:, 0]
    step = np.linalg.matrix_power(np.eye(4) - hessian / 8, 5)
    centre = optimum + step @ (start.mean(0) - optimum)
    differences = (start - start.mean(0)) @ step / (1 + 2 / 8 * coupling) ** 5
    # A weight of order one is rounded to 1e-16, some ten times in five steps. A difference can
    # also not be finer than the weights' own rounding.
    np.testing.assert_allclose(flat(model.centre.weights), centre, atol=1e-14)
    np.testing.assert_allclose(weights_of(model) - centre, differences, atol=1e-14)
    distance = np.sqrt(np.mean(np.sum(differences**2, axis=1)))
    # The distance in the logs is a float32 one, of differences of weights rounded to 1e-16.
    np.testing.assert_allclose(logs.history["distance"][-1], distance, rtol=1e-6, atol=1e-15)
    assert logs.history["coupling"] == [coupling] * 5


RUNS = {
    "batch norm, penalties, sample weights": (normalized, X, Y, WEIGHTS, "mse"),
    "sharp softmax": (classifier, 100 * X, LABELS, None, "sparse_categorical_crossentropy"),
    "masks": (masked, TOKENS, TOKENS[..., None], None, "mse"),
    "dicts": (
        two_in_two_out,
        {"a": X, "b": X[::-1]},
        {"c": LABELS, "d": Y},
        {"c": WEIGHTS, "d": WEIGHTS[::-1]},
        {"c": "sparse_categorical_crossentropy", "d": "mse"},
    ),
    "subclass": (subclass, X, Y, None, "mae"),
}


def cut(structure, rows):
    return None if structure is None else keras.tree.map_structure(lambda a: a[rows], structure)


@pytest.mark.parametrize(
    ("run", "size"),
    [
        ("batch norm, penalties, sample weights", 8),
        pytest.param("dicts", 8, marks=pytest.mark.slow),
        pytest.param("sharp softmax", 8, marks=pytest.mark.slow),
        pytest.param("masks", 8, marks=pytest.mark.slow),
        pytest.param("masks", 6, marks=pytest.mark.slow),
        pytest.param("subclass", 8, marks=pytest.mark.slow),
    ],
)
def test_without_coupling_replicas_are_independent_runs(float64, run, size):
    """Each is a plain model that is trained on its shares of the batches."""
    make, x, y, sample_weight, loss = RUNS[run]
    model = ReplicatedModel(make(), 3, coupling=0.0)
    plain = [copied(r) for r in model.replicas]
    for m in (model, *plain):
        m.compile(sgd(momentum=0.5), loss, **EAGER)
    totals, sizes, logged = [], [], []
    for start in range(0, 2 * size, size):
        rows = [start + share for share in slices(size, 3)]
        batch = [cut(part, np.arange(start, start + size)) for part in (x, y, sample_weight)]
        logged.append(model.train_on_batch(*batch, return_dict=True))
        shares = [[cut(part, share) for part in (x, y, sample_weight)] for share in rows]
        totals.append(
            [m.train_on_batch(*s, return_dict=True)["loss"] for m, s in zip(plain, shares)]
        )
        sizes = [len(share) for share in rows]
    for replica, expected in zip(model.replicas, plain):
        # Gradients of order one, rounded to 1e-16, in sums that may have another order.
        assert_allclose(flat(replica.weights), flat(expected.weights), rtol=1e-12, atol=1e-14)
    names = [f"replica_{k}_loss" for k in range(3)]
    # Metrics keep float32 sums.
    np.testing.assert_allclose([[logs[n] for n in names] for logs in logged], totals, rtol=1e-6)
    means = np.average(totals, axis=1, weights=sizes)
    np.testing.assert_allclose([logs["loss"] for logs in logged], means, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "y", "loss", "metrics", "mode"),
    [
        pytest.param(random, Y, "mse", ["mae"], {}, marks=pytest.mark.slow),
        (random, Y, "mse", ["mae"], EAGER),
        pytest.param(
            classifier,
            LABELS,
            "sparse_categorical_crossentropy",
            ["accuracy"],
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["random", "random, eager", "softmax"],
)
def test_one_replica_trains_like_plain_keras(make, y, loss, metrics, mode):
    """To the bit: weights, batch-norm statistics, dropout masks and logs."""
    plain = make()
    model = ReplicatedModel(copied(plain), 1)
    histories = []
    for m in (model, plain):
        m.compile(sgd(momentum=0.5), loss, metrics=metrics, **mode)
        keras.utils.set_random_seed(1)  # torch draws masks from a global generator
        fit = m.fit(X[:20], y[:20], sample_weight=WEIGHTS[:20], **FIT)
        histories.append(fit.history)
    for name in histories[1]:
        assert histories[0][name] == histories[1][name], name
    assert_array_equal(flat(model.replicas[0].variables), flat(plain.variables))
    assert_array_equal(flat(model.centre.weights), flat(plain.weights))


def test_automatic_coupling_is_loss_over_distance_and_grows_by_1e4():
    model = ReplicatedModel(network(), 3)
    twin = ReplicatedModel(copied(model.centre), 3, coupling=0.0)
    for replica, other in zip(twin.replicas, model.replicas):
        replica.set_weights(other.get_weights())
    for m in (model, twin):
        m.compile(sgd(), "mse", **EAGER)
    loss = twin.train_on_batch(X[:8], Y[:8], return_dict=True)["loss"]
    apart = weights_of(twin)
    first = loss / np.mean(np.sum((apart - apart.mean(0)) ** 2, axis=1))
    logs = model.fit(X[:8], Y[:8], epochs=4, **FIT).history
    expected = [first * 1e4 ** (k / 4) for k in range(4)]
    # Float32: sums of some fifty squares, and at most four factors.
    np.testing.assert_allclose(logs["coupling"], expected, rtol=1e-5)
    assert list(np.argsort(logs["distance"])) == [3, 2, 1, 0]


def test_the_centre_is_the_mean_of_weights_and_statistics():
    model = ReplicatedModel(random(), 3)
    model.compile(sgd(use_ema=True), "mse", **EAGER)
    model.fit(X[:8], Y[:8], epochs=2, **FIT)
    for *values, mean in zip(*(m.weights for m in (*model.replicas, model.centre))):
        # Three float32 numbers are added and divided. After the coupling a replica is rounded anew.
        assert_allclose(mean, np.mean([numpy(v) for v in values], axis=0), rtol=1e-6, atol=1e-7)
    before = flat(model.centre.weights)
    assert_allclose(model(X), model.centre(X))
    reestimate_batch_norm(model.centre, X)
    layer = model.centre.layers[2]
    moments = keras.Model(model.centre.input, layer.input)(X)
    # A mean of 24 float32 numbers of order one.
    assert_allclose(layer.moving_mean, np.mean(numpy(moments), axis=0), atol=1e-6)
    assert np.any(flat(model.centre.weights) != before)


def test_evaluation_is_of_the_centre():
    model = ReplicatedModel(normalized(), 2)
    plain = model.centre
    model.compile(sgd(), "mse", metrics=["mae"], **EAGER)
    logs = model.fit(X[:8], Y[:8], epochs=1, validation_data=(X, Y), **FIT).history
    plain.compile(sgd(), "mse", metrics=["mae"], **EAGER)
    expected = plain.evaluate(X, Y, verbose=0, return_dict=True)
    assert model.evaluate(X, Y, verbose=0, return_dict=True) == expected
    for name, value in expected.items():
        # In batches of another size: float32 sums.
        assert logs[f"val_{name}"] == pytest.approx([value], rel=1e-6)
    assert model.test_on_batch(X, Y) == pytest.approx(list(expected.values()), rel=1e-6)
    assert set(logs) - {f"val_{k}" for k in expected} == {
        *expected, "replica_0_loss", "replica_1_loss", "distance", "coupling"
    }  # fmt: skip
    assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))


@pytest.mark.parametrize("mode", [EAGER, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_replicas_without_examples_keep_still(mode):
    model = ReplicatedModel(linear(), 3, coupling=0.0)
    model.compile(sgd(), "mse", **mode)
    before = weights_of(model)
    logs = model.fit(X[:10], Y[:10, :1], **FIT).history  # the last batch has two examples
    with_two = weights_of(model)
    model.fit(X[:2], Y[:2, :1], **FIT)
    moved = np.any(weights_of(model) != with_two, axis=1)
    assert list(moved) == [True, True, False]
    assert np.all(with_two != before) and np.isfinite(logs["loss"]).all()


def test_replicas_are_pulled_where_accumulated_gradients_move_them():
    model = ReplicatedModel(linear(), 2, coupling=64.0)
    model.compile(sgd(gradient_accumulation_steps=2), "mse", **EAGER)
    start = weights_of(model)
    model.train_on_batch(X[:8], Y[:8, :1])
    np.testing.assert_array_equal(weights_of(model), start)
    model.train_on_batch(X[8:16], Y[8:16, :1])
    (a, b), (a_0, b_0) = weights_of(model), start
    # 2 lr g = 16; the gradients' step moves weights by less than their distance.
    assert np.linalg.norm(a - b) < 2 / 17 * np.linalg.norm(a_0 - b_0)


def test_the_pull_follows_the_learning_rate_of_the_step():
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([0], [1 / 8, 0.0])
    model = ReplicatedModel(linear(), 2, coupling=0.5)
    model.compile(keras.optimizers.SGD(rate), "mse", **EAGER)
    x, y = np.zeros((4, 4)), np.zeros((4, 1))  # without a gradient
    a, b = weights_of(model)
    for _ in range(2):
        model.train_on_batch(x, y)
    # Weights of order one are float32 numbers.
    expected = (a - b) / (1 + 2 * 0.5 / 8)
    np.testing.assert_allclose(np.subtract(*weights_of(model)), expected, atol=1e-6)


def test_mixed_precision_skips_an_overflowing_step_altogether():
    keras.config.set_dtype_policy("mixed_float16")
    model = ReplicatedModel(network(), 2, coupling=4.0)
    model.compile(sgd(), "mse", **EAGER)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    start = weights_of(model)
    bad = X[:8].copy()
    bad[-1] = np.inf
    model.train_on_batch(bad, Y[:8])
    np.testing.assert_array_equal(weights_of(model), start)
    model.train_on_batch(X[:8], Y[:8])
    assert np.isfinite(weights_of(model)).all() and np.any(weights_of(model) != start)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [True, False])
def test_compiled_steps_take_the_eager_ones(jit):
    if jit and BACKEND == "torch":
        pytest.skip("torch.compile takes half a minute a model")
    weights = []
    for mode in (EAGER, {"jit_compile": jit}):
        keras.utils.set_random_seed(0)
        model = ReplicatedModel(normalized(), 3)
        model.compile(sgd(momentum=0.5), "mse", **mode)
        model.fit(X[:20], Y[:20], epochs=2, **FIT)
        weights.append(weights_of(model))
    # Six steps of float32, with penalties that grow to a strong pull to the mean.
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [network, normalized])
def test_two_devices_take_the_step_of_one(mirrored, float64, make):
    """A device cuts its half of the batch: the replica sees a part of each half."""
    if make is normalized:
        # Keras itself counts an activity penalty twice where devices wait for each other.
        def make():
            return network(keras.layers.BatchNormalization(synchronized=True), activity=None)

    order = np.concatenate([np.r_[0:2, 4:6, 2:4, 6:8] + k for k in (0, 8, 16)])
    keras.utils.set_random_seed(0)
    with mirrored.scope():
        model = ReplicatedModel(make(), 2)
        model.compile(sgd(momentum=0.5), "mse")
    keras.utils.set_random_seed(0)
    expected = ReplicatedModel(make(), 2)
    expected.compile(sgd(momentum=0.5), "mse", run_eagerly=True)
    logs = model.fit(X, Y, epochs=2, sample_weight=WEIGHTS, **FIT).history
    rows = {"sample_weight": WEIGHTS[order], **FIT}
    expected_logs = expected.fit(X[order], Y[order], epochs=2, **rows).history
    copies = [model.distribute_strategy.experimental_local_results(v.value) for v in model.weights]
    for first, second in copies:
        assert_array_equal(first, second)
    # The coupling is a float32 number, rounded to 6e-8 in six steps.
    np.testing.assert_allclose(flat(model.weights), flat(expected.weights), rtol=1e-5, atol=1e-7)
    assert list(logs) == list(expected_logs)
    for name in logs:
        np.testing.assert_allclose(logs[name], expected_logs[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_device_may_be_left_without_examples(mirrored):
    with mirrored.scope():
        model = ReplicatedModel(network(), 2)
        model.compile(sgd(), "mse")
    logs = model.fit(X[:17], Y[:17], **FIT).history
    assert np.isfinite(flat(model.weights)).all()
    assert np.isfinite(list(logs.values())).all()


@pytest.mark.slow
@only_on("jax", reason="`keras.distribution` shares batches on JAX alone.")
def test_devices_that_share_batches_take_the_step_of_one():
    found = []
    for distribution in (None, keras.distribution.DataParallel()):
        keras.distribution.set_distribution(distribution)
        try:
            keras.utils.set_random_seed(0)
            model = ReplicatedModel(normalized(), 2)
            model.compile(sgd(momentum=0.5), "mse")
            logs = model.fit(X, Y, epochs=2, sample_weight=WEIGHTS, **FIT).history
        finally:
            keras.distribution.set_distribution(None)
        found.append([flat(model.weights), *(logs[name] for name in sorted(logs))])
    for first, second in zip(*found):
        # Six steps of float32, in sums of another order.
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_start():
    frozen = network(keras.layers.Dense(6, trainable=False), keras.layers.BatchNormalization())
    given = flat(frozen.weights)
    model = ReplicatedModel(frozen, 3)
    assert_array_equal(flat(model.replicas[0].weights), given)
    kernels = [numpy(r.layers[1].kernel) for r in model.replicas]
    assert np.all(kernels[0] != kernels[1]) and np.all(kernels[1] != kernels[2])
    for replica in (*model.replicas, model.centre):
        # A mean of three equal numbers may be rounded.
        assert_allclose(replica.layers[2].kernel, model.replicas[0].layers[2].kernel, rtol=1e-6)
    same = ReplicatedModel(network(), 3, coupling=1.0, same_start=True)
    np.testing.assert_array_equal(*weights_of(same)[:2])


def test_a_compiled_model_may_be_given():
    plain = subclass()
    plain.compile(sgd(), "mse")
    model = ReplicatedModel(plain, 2)
    assert plain.compiled and not any(r.compiled for r in model.replicas)
    assert model.centre is plain


class NoConfig(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.dense = keras.layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


class OwnStep(keras.Model):
    def train_step(self, data):
        return {}


def no_config():
    model = NoConfig(2)
    model.build((None, 4))
    return model


def fixed_seed():
    kernel = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer=kernel)])


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "match"),
    [
        (lambda: 3, {}, TypeError, "`model` must be a `keras.Model`. Received: model=3"),
        (lambda: keras.Sequential([keras.layers.Dense(1)]), {}, ValueError, "must be built"),
        (lambda: OwnStep(*(2 * [keras.Input((4,))])), {}, ValueError, "override `train_step`"),
        (no_config, {}, ValueError, "must return a built copy .* Give its class a `get_config`"),
        (fixed_seed, {}, ValueError, "replicas that are equal"),
        (linear, {"same_start": True}, ValueError, "`coupling` must be a number"),
        (linear, {"num_replicas": 0}, ValueError, "Received: num_replicas=0"),
        (linear, {"coupling": -1.0}, ValueError, "Received: coupling=-1.0"),
        (linear, {"coupling": "fast"}, ValueError, "Received: coupling='fast'"),
        (linear, {"growth": 0}, ValueError, "Received: growth=0"),
        (linear, {"same_start": 1}, ValueError, "Received: same_start=1"),
    ],
)
def test_bad_arguments(make, kwargs, error, match):
    with pytest.raises(error, match=match):
        ReplicatedModel(make(), **kwargs)
