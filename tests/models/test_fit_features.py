"""Each feature of `compile` and `fit`, with the regulariser.

`check` trains three models from the same seed, in float64: a plain `keras.Model`, a
`RegularizedModel`, and `Literal`, a plain model whose eager step is a slow reading of Algorithm 1
that moves the weights in place. With beta = 0 the first two agree to the bit, in weights, state,
optimizer, metrics and logs; with beta > 0 the last two agree to rounding. One update is rounded to
some 1e-15 and the regulariser's part of it is of order 1e-3; 1e-9 of that part leaves room for
four steps.
"""

import contextlib
import csv

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    apply,
    generator_states,
    gradients,
    numpy,
    only_on,
    restore_generators,
    slices,
    stateful_step,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Objective
from keras_infomcr.regularizers import SubBatchPerturbation
from keras_infomcr.sub_batches import Batch

ALPHA, BETA = 0.05, 2.0


def literal_base(num_sub_batches=2):
    """Return a class in the place of `keras.Model`; a fresh one, as Keras rewrites its bases."""

    class Literal(keras.Model):
        beta = 0.0

        def train_step(self, *args):
            if not self.beta:
                return super().train_step(*args)
            return stateful_step(self, self.literal_step, *args)

        def literal_step(self, data):
            data = keras.tree.map_structure(to_tensor, data)
            x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
            # Keras does not list the states of recurrent layers among the variables.
            states = [v for layer in self.layers for v in getattr(layer, "states", None) or []]
            before = [(v, v.numpy()) for v in states]
            untouched = copy_of(weights)
            y_pred, loss, found = self.evaluate_at(x, y, weights, penalties=True)
            self._loss_tracker.update_state(loss, sample_weight=batch_size(x))
            after = [(v, v.numpy()) for v in self.variables + self.metrics_variables + states]
            restore(before)
            generators = generator_states()
            total = self.regularizer(x, y, untouched)
            restore(after)
            restore_generators(generators)
            scale = self.optimizer.scale_loss(1.0)
            found = [
                None if g is None else scale * (g + self.beta * r) for g, r in zip(found, total)
            ]
            apply(self.optimizer, found, self.trainable_variables)
            return self.compute_metrics(x, y, y_pred, sample_weight=weights)

        def evaluate_at(self, x, y, weights, penalties=False, rows=None):
            kwargs = {"training": True} if self._call_has_training_arg else {}
            own_weights = weights if penalties else copy_of(weights)

            def loss():
                y_pred = self(x, **kwargs)
                if rows is not None:
                    y_pred = keras.ops.take(y_pred, rows, axis=0)
                loss = self._compute_loss(x, y, y_pred, own_weights, training=True)
                if not penalties:
                    loss -= sum(v.regularizer(v) for v in self.trainable_variables if v.regularizer)
                return loss, y_pred

            loss, y_pred, found = gradients(loss, self.trainable_variables)
            return y_pred, loss, found

        def regularizer(self, x, y, weights):
            variables = self.trainable_variables
            states = [v for layer in self.layers for v in getattr(layer, "states", None) or []]
            total, size, value = [0.0 for _ in variables], batch_size(x), 0.0
            for rows in slices(size, num_sub_batches):
                # Stateful layers see the whole batch and the loss its part: nothing is coupled.
                part = (x if states else take(x, rows)), take(y, rows), take(weights, rows)
                keep = rows if states else None
                state = [(v, v.numpy()) for v in self.non_trainable_variables + states]
                generators = generator_states()
                _, loss, g = self.evaluate_at(*part, rows=keep)
                seeds = [(v, v.numpy()) for v, _ in state if "float" not in v.dtype]
                restore(state)
                restore_generators(generators)
                here = [(v, v.numpy()) for v in variables]
                for v, d in zip(variables, g):
                    if d is not None:
                        v.assign(v - ALPHA * d)
                _, loss_moved, h = self.evaluate_at(*part, rows=keep)
                restore(here + state + seeds)
                fraction = len(rows) / size
                value += fraction * float(loss - loss_moved)
                total = [t if a is None else t + fraction * (a - b) for t, a, b in zip(total, g, h)]
            self.values.append((value, size))
            return total

    return Literal


def to_tensor(array):
    whole = array is None or type(array).__name__ in ("SparseTensor", "RaggedTensor", "BCOO")
    return array if whole else keras.ops.convert_to_tensor(array)


def copy_of(weights):
    """Keras's losses change sample weights in place on torch."""
    return keras.tree.map_structure(lambda a: None if a is None else keras.ops.copy(a), weights)


def batch_size(x):
    first = keras.tree.flatten(x)[0]
    return int(first.shape[0] if first.shape[0] is not None else first.nrows())


def take(structure, rows):
    def of(array):
        if array is None:
            return None
        if type(array).__name__ in ("SparseTensor", "RaggedTensor"):
            import tensorflow as tf

            if isinstance(array, tf.RaggedTensor):
                return tf.gather(array, rows)
            return tf.sparse.from_dense(tf.gather(tf.sparse.to_dense(array), rows))
        dense = keras.ops.take(keras.ops.convert_to_tensor(array, sparse=False), rows, axis=0)
        return type(array).fromdense(dense) if type(array).__name__ == "BCOO" else dense

    return keras.tree.map_structure(of, structure)


def restore(values):
    for variable, value in values:
        variable.assign(value)


def trained(base, build, fit, compile, **kwargs):
    """Return a model of a fixed seed, trained, with its logs."""
    keras.utils.set_random_seed(0)
    model = build(base)
    model.compile(**compile(), **kwargs)
    return model, fit(model)


def eagerly(compile):
    return {**compile, "run_eagerly": True, "jit_compile": False, "steps_per_execution": 1}


def variables(model):
    of_metrics = [v for metric in model.metrics for v in metric.variables]
    everything = [*model.variables, *model.optimizer.variables, *of_metrics]
    return [numpy(v) for v in everything]


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays]).astype("float64")


def weights_of(model):
    return flat(map(numpy, model.weights))


def assert_same(ours, plain, tolerance=0.0):
    """Compare variables or logs, to the bit or relative to their norm."""
    if isinstance(ours, dict):
        assert list(ours) == list(plain)
        ours, plain = list(ours.values()), list(plain.values())
    assert [np.shape(a) for a in ours] == [np.shape(a) for a in plain]
    ours, plain = flat(ours), flat(plain)
    if tolerance:
        assert np.linalg.norm(ours - plain) <= tolerance * np.linalg.norm(plain)
    else:
        np.testing.assert_array_equal(ours, plain)


def check(build, fit, compile, main="full_batch", tolerance=0.0, literal=True, count=2):
    """Assert that beta = 0 is plain Keras and that beta > 0 is Algorithm 1.

    Args:
        build: Function of a base class that returns a model.
        fit: Function of the model that trains it and returns its logs, a dictionary.
        compile: Function that returns the arguments of `compile`.
        main: The `main_gradient`; to the bit only `"full_batch"` can agree.
        tolerance: For beta = 0.
        literal: Boolean, whether to compare with `Literal`.
        count: Integer, M.
    """
    if main != "full_batch" or BACKEND == "jax":  # XLA fuses the two programs differently
        tolerance = tolerance or 1e-13
    regularizer = SubBatchPerturbation(ALPHA, 0.0, count, main)
    ours, logs = trained(RegularizedModel, build, fit, compile, regularizer=regularizer)
    plain, plain_logs = trained(keras.Model, build, fit, compile)
    value = logs.pop("infomcr_reg", None)
    assert value is None or np.isfinite(value).all() or not literal
    assert_same(variables(ours), variables(plain), tolerance)
    assert_same(logs, plain_logs, tolerance)
    if not literal:
        return ours
    slow, _ = trained(literal_base(count), build, fit, lambda: eagerly(compile()))
    slow.beta, slow.values = BETA, []
    ours.regularizer.beta = BETA
    all_logs = []
    for model in (ours, slow, plain):
        keras.utils.set_random_seed(1)
        all_logs.append(fit(model))
    logs, slow_logs, _ = all_logs
    got = logs.pop("infomcr_reg", None)
    if got is not None:
        values, sizes = np.transpose(slow.values)
        np.testing.assert_allclose(got, [np.average(values, weights=sizes)], rtol=1e-9)
    # Keras weights the losses of single outputs by the batch size, but only where it is eager.
    of_outputs = [key for key in logs if key.endswith(("a_loss", "b_loss"))]
    assert_same(*({k: a[k] for k in a if k not in of_outputs} for a in (logs, slow_logs)), 1e-9)
    effect = np.linalg.norm(weights_of(slow) - weights_of(plain))
    assert effect > 1e-6
    assert np.linalg.norm(weights_of(ours) - weights_of(slow)) <= 1e-9 * effect
    return ours


# Data and networks. Batches of 5 examples and of 1: sub-batches of 3 and 2, and a single one.

SIZE = 6
draw = np.random.default_rng(0)
X = draw.normal(size=(SIZE, 4))
Y = draw.normal(size=(SIZE, 2))
LABELS = draw.integers(3, size=SIZE)
WEIGHTS = draw.uniform(0.2, 3, size=SIZE)

pytestmark = pytest.mark.usefixtures("float64")
# How the step runs. Eagerly where a graph would show nothing more: tracing is what takes time here.
EAGER, XLA = {"run_eagerly": True}, {"jit_compile": True}
with_main_gradient = pytest.mark.parametrize(
    ("main", "mode"), [("full_batch", EAGER), ("auto", {})], ids=["full_batch", "auto"]
)


def fitting(x=X, y=Y, **kwargs):
    """Return a function that fits a model and returns its logs."""
    kwargs = {"batch_size": 5, "shuffle": False, "verbose": 0, **kwargs}
    return lambda model: dict(model.fit(x, y, **kwargs).history)


def compiling(optimizer=lambda: sgd(), **kwargs):
    """Return a function that makes the arguments of `compile`, with a new optimizer each time."""
    return lambda: {"optimizer": optimizer(), "loss": "mse", **kwargs}


def sgd(**kwargs):
    # Numbers exact in float32, through which Keras takes them.
    return keras.optimizers.SGD(1 / 8, **kwargs)


def two_layers(base, **kwargs):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh", **kwargs)(inputs)
    return base(inputs, keras.layers.Dense(2, **kwargs)(hidden))


def classifier(base):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh")(inputs)
    return base(inputs, keras.layers.Dense(3, "softmax")(hidden))


def two_heads(base):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "tanh")(inputs)
    a = keras.layers.Dense(3, "softmax", name="a")(hidden)
    return base(inputs, {"a": a, "b": keras.layers.Dense(2, name="b")(hidden)})


def normalized(base):
    """Everything that has state: batch norm, dropout, noise and a metric of a layer's own."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.75)(x)
    x = keras.layers.Activation("gelu")(x)
    if BACKEND != "jax":  # where Keras cannot update metrics in a layer
        x = Measured()(x)
    x = keras.layers.GaussianNoise(0.1)(keras.layers.Dropout(0.25)(x))
    return base(inputs, keras.layers.Dense(2)(x))


class Measured(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean(name="size")

    def call(self, x):
        self.mean.update_state(keras.ops.abs(x))
        return x


class ActivityLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**4))
        return x


HEADS = {
    "loss": {"a": "sparse_categorical_crossentropy", "b": "mse"},
    "metrics": {"a": ["accuracy"], "b": ["mae"]},
}


# What the loss is made of


@pytest.mark.slow
@with_main_gradient
def test_losses_and_metrics_per_output(main, mode):
    labels = {"a": LABELS, "b": Y}
    fit = fitting(y=labels, validation_data=(X[:6], {"a": LABELS[:6], "b": Y[:6]}))
    ours = check(two_heads, fit, compiling(**mode, **HEADS), main)
    logs = ours.fit(X, labels, verbose=0).history
    assert {"loss", "a_loss", "b_loss", "a_accuracy", "b_mae", "infomcr_reg"} == set(logs)


@pytest.mark.slow
def test_loss_weights():
    loss_weights = {"a": 0.25, "b": 3.0}
    compile = compiling(**EAGER, **HEADS, loss_weights=loss_weights)
    check(two_heads, fitting(y={"a": LABELS, "b": Y}), compile, "auto")


@with_main_gradient
def test_weighted_metrics_and_sample_weight(main, mode):
    compile = compiling(**mode, metrics=["mae"], weighted_metrics=["mse"])
    check(two_layers, fitting(sample_weight=WEIGHTS), compile, main)


@pytest.mark.slow
def test_sample_weight_per_output():
    weights = {"a": WEIGHTS, "b": WEIGHTS[::-1].copy()}
    fit = fitting(y={"a": LABELS, "b": Y}, sample_weight=weights)
    check(two_heads, fit, compiling(**EAGER, **HEADS), "auto")


def test_class_weight():
    fit = fitting(y=LABELS, class_weight={0: 0.5, 1: 2.0, 2: 4.0})
    check(classifier, fit, compiling(**EAGER, loss="sparse_categorical_crossentropy"), "auto")


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_reduction_of_the_loss(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    check(two_layers, fitting(sample_weight=WEIGHTS), compiling(**EAGER, loss=loss), "auto", 1e-15)


def test_add_loss():
    def build(base):
        inputs = keras.Input((4,))
        hidden = ActivityLoss()(keras.layers.Dense(3, "tanh")(inputs))
        return base(inputs, keras.layers.Dense(2)(hidden))

    check(build, fitting(), compiling())


@pytest.mark.parametrize("main", ["full_batch", "sub_batches"])
def test_training_by_add_loss_alone(main):
    def build(base):
        inputs = keras.Input((4,))
        return base(inputs, ActivityLoss()(keras.layers.Dense(3)(inputs)))

    check(build, fitting(y=None), compiling(loss=None), main)


def test_activity_penalty():
    check(lambda base: two_layers(base, activity_regularizer="l2"), fitting(), compiling(**EAGER))


def test_a_loss_at_the_address_of_one_long_gone():
    class EveryAddress(set):
        gone = False

        def __contains__(self, address):
            return not self.gone or super().__contains__(address)

        def clear(self):
            self.gone = True

    def loss():
        value, _ = objective(objective.weights(), objective.state(), Batch(X, Y))
        return float(numpy(value))

    model = two_layers(keras.Model, activity_regularizer="l2")
    model.compile("sgd", "mse")
    objective = Objective(model)
    before = loss()
    ids = [EveryAddress() for _ in model.layers]
    for layer, addresses in zip(model.layers, ids):
        object.__setattr__(layer, "_loss_ids", addresses)
    assert loss() == before
    assert all(addresses.gone for addresses in ids)


@with_main_gradient
def test_weight_penalties(main, mode):
    penalties = {
        "kernel_regularizer": keras.regularizers.L1L2(1 / 64, 1 / 32),
        "bias_regularizer": keras.regularizers.L2(1 / 16),
    }
    check(lambda base: two_layers(base, **penalties), fitting(), compiling(**mode), main)


def test_overridden_compute_loss():
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                loss = super().compute_loss(x, y, y_pred, sample_weight, training)
                return loss + keras.ops.mean(y_pred**4) * (1 if training else 100)

        return two_layers(Net, kernel_regularizer=keras.regularizers.L2(1 / 32))

    check(build, fitting(sample_weight=WEIGHTS), compiling(**EAGER))


def test_overridden_compute_loss_without_training():
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                return keras.ops.mean((y - y_pred) ** 4) + sum(self.losses)

        return two_layers(Net, kernel_regularizer=keras.regularizers.L2(1 / 32))

    check(build, fitting(), compiling(**EAGER, loss=None))


@pytest.mark.parametrize("main", ["full_batch", "sub_batches"])
def test_metrics_updated_in_compute_loss(main):
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                self.largest.update_state(keras.ops.abs(y_pred))
                return keras.ops.mean((y - y_pred) ** 4)

        model = two_layers(Net)
        model.largest = keras.metrics.Mean(name="largest")
        return model

    check(build, fitting(), compiling(**EAGER, loss=None), main)


def test_overridden_compute_metrics():
    def build(base):
        class Net(base):
            def compute_metrics(self, x, y, y_pred, sample_weight=None):
                logs = super().compute_metrics(x, y, y_pred, sample_weight)
                return {**logs, "largest": keras.ops.max(y_pred)}

        return two_layers(Net)

    ours = check(build, fitting(), compiling(**EAGER, metrics=["mae"]))
    assert set(ours.fit(X, Y, verbose=0).history) == {"loss", "mae", "largest", "infomcr_reg"}


@pytest.mark.slow
def test_overridden_train_step_that_calls_the_inherited_one():
    def build(base):
        class Net(base):
            def train_step(self, *args):
                returned = super().train_step(*args)
                if BACKEND == "jax":
                    return {**returned[0], "one": 1.0}, returned[1]
                return {**returned, "one": 1.0}

        return two_layers(Net)

    check(build, fitting(), compiling(**EAGER))


# The optimizer


OPTIMIZERS = {
    "momentum": lambda: sgd(momentum=1 / 2),
    "EMA": lambda: sgd(use_ema=True, ema_momentum=0.75),
    "gradient accumulation": lambda: sgd(gradient_accumulation_steps=2),
    "clipnorm": lambda: sgd(clipnorm=1 / 8),
    "global_clipnorm": lambda: sgd(global_clipnorm=1 / 8),
    "clipvalue": lambda: sgd(clipvalue=1 / 16),
    "weight decay": lambda: keras.optimizers.AdamW(1 / 64),
    "loss scale": lambda: sgd(loss_scale_factor=1024.0),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.PiecewiseConstantDecay([1], [1 / 8, 1 / 16])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer(optimizer):
    check(two_layers, fitting(), compiling(optimizer, **EAGER))


@pytest.mark.slow
def test_optimizer_in_a_graph():
    def optimizer():
        # On JAX Keras cannot call `fit` twice with EMA: it donates a buffer to itself.
        use_ema = BACKEND != "jax"
        return sgd(use_ema=use_ema, gradient_accumulation_steps=2, clipnorm=1 / 8)

    check(two_layers, fitting(), compiling(optimizer))


def test_weight_constraints():
    constraint = keras.constraints.MaxNorm(1 / 2)
    check(
        lambda base: two_layers(base, kernel_constraint=constraint), fitting(), compiling(**EAGER)
    )


# How the step runs


@pytest.mark.slow
@only_on("tensorflow", "jax", reason="Keras refuses `steps_per_execution` on torch")
def test_steps_per_execution():
    check(two_layers, fitting(), compiling(steps_per_execution=2), "auto")


def test_jit_compile():
    # XLA fuses the two programs differently.
    check(two_layers, fitting(), compiling(**XLA), "auto", 1e-13)


def test_run_eagerly():
    check(two_layers, fitting(), compiling(**EAGER), "auto")


@pytest.mark.parametrize(("main", "eagerly"), [("full_batch", False), ("auto", True)])
def test_train_on_batch(main, eagerly):
    def fit(model):
        batches = [slice(0, 5), slice(5, 6)]
        returned = [model.train_on_batch(X[s], LABELS[s], WEIGHTS[s]) for s in batches]
        assert all(isinstance(r, list) and len(r) == 2 for r in returned)
        named = model.train_on_batch(X, LABELS, class_weight={0: 1, 1: 2, 2: 3}, return_dict=True)
        return {**named, "batches": flat(returned)}

    compile = compiling(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    check(classifier, fit, lambda: {**compile(), "run_eagerly": eagerly}, main)


def test_batches_of_known_size():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(5, drop_remainder=True)
    check(two_layers, fitting(dataset, None, batch_size=None), compiling(), "auto")


def test_python_data_set():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return X[5 * i : 5 * i + 5], Y[5 * i : 5 * i + 5]

    check(
        two_layers,
        lambda m: fitting(Batches(), None, batch_size=None)(m),
        compiling(**EAGER),
        "auto",
    )


# Layers


def test_frozen_layers():
    def build(base):
        model = two_layers(base, kernel_regularizer=keras.regularizers.L2(1 / 32))
        model.layers[1].trainable = False
        return model

    check(build, fitting(), compiling(**EAGER), "auto")


def test_frozen_layers_stay_as_they_are_to_the_bit(rng):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    inputs = keras.Input((5,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(7)(inputs))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(x))
    for layer in model.layers[1:3]:
        layer.trainable = False
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=3))
    before = [rng.uniform(1, 2, v.shape) for v in model.non_trainable_variables]
    for variable, value in zip(model.non_trainable_variables, before):
        variable.assign(value)
    model.fit(rng.normal(size=(20, 5)), rng.normal(size=(20, 2)), batch_size=10, verbose=0)
    for variable, value in zip(model.non_trainable_variables, before):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value.astype("float32"))


def test_all_layers_frozen():
    def build(base):
        model = normalized(base)
        model.trainable = False
        return model

    untrainable = pytest.warns(UserWarning, match="does not have any trainable weights")
    with (
        pytest.warns(UserWarning, match="did not act"),
        contextlib.nullcontext() if BACKEND == "jax" else untrainable,
    ):
        check(build, fitting(), compiling(**EAGER), literal=False)


@pytest.mark.slow
@with_main_gradient
def test_layers_that_the_loss_does_not_reach(main, mode):
    def build(base):
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(3, "tanh")(inputs)
        return base(inputs, [keras.layers.Dense(2)(hidden), keras.layers.Dense(1)(hidden)])

    warned = pytest.warns(UserWarning, match="Gradients do not exist for variables")
    with contextlib.nullcontext() if BACKEND == "jax" else warned:  # where they are zero
        check(build, fitting(y=[Y, Y[:, :1]]), compiling(**mode, loss=["mse", None]), main)


def test_masks():
    def build(base):
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
        return base(inputs, keras.layers.LSTM(2, return_sequences=True)(x))

    lengths = draw.integers(1, 4, size=SIZE)
    words = draw.integers(1, 5, size=(SIZE, 3)) * (np.arange(3) < lengths[:, None])
    weights = draw.uniform(0.2, 3, size=(SIZE, 3))
    fit = fitting(words, draw.normal(size=(SIZE, 3, 2)), sample_weight=weights)
    check(build, fit, compiling(**EAGER, metrics=["mae"], weighted_metrics=["mse"]))


def sequences(size):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(size, 3, 2)), generator.normal(size=(size, 2))
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True)


not_stateful_on_torch = only_on(
    "tensorflow", "jax", reason="Keras cannot train stateful recurrent layers on torch"
)


def stateful(base):
    inputs = keras.Input(batch_shape=(4, 3, 2))
    return base(inputs, keras.layers.LSTM(2, stateful=True, unroll=True)(inputs))


@not_stateful_on_torch
def test_stateful_layers():
    # On JAX Keras begins each batch with states of zero, where the literal reading carries them.
    literal = BACKEND != "jax"
    check(stateful, fitting(sequences(8), None, batch_size=None), compiling(), literal=literal)


@pytest.mark.slow
@not_stateful_on_torch
def test_stateful_layers_fed_with_arrays():
    x, y = (np.concatenate(a) for a in zip(*sequences(8).as_numpy_iterator()))
    check(stateful, fitting(x, y, batch_size=4), compiling(), literal=False)


@not_stateful_on_torch
def test_stateful_layers_need_sub_batches_of_one_size():
    model = stateful(RegularizedModel)
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=3))
    message = "must be a multiple of `num_sub_batches`.*Received: batch size=4, num_sub_batches=3"
    with pytest.raises(ValueError, match=message):
        model.fit(sequences(8), verbose=0, shuffle=False)


@pytest.mark.slow
def test_models_built_at_the_first_step():
    def build(base):
        class Net(base):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(3, "tanh")
                self.normalization = keras.layers.BatchNormalization()
                self.out = keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(1 / 32))

            def call(self, x, training=False):
                return self.out(self.normalization(self.hidden(x), training=training))

        return Net()

    check(build, fitting(), compiling())


def test_call_without_training_argument():
    def build(base):
        class Net(base):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(3, "tanh")
                self.dropout = keras.layers.Dropout(0.25)

            def call(self, x):
                return self.dropout(self.hidden(x))

        return Net()

    check(build, fitting(y=draw.normal(size=(SIZE, 3))), compiling(**EAGER))


def test_nested_and_dict_inputs():
    def build(base):
        first, second, third = (keras.Input((n,), name=f"input_{n}") for n in (1, 2, 3))
        inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh")])
        parts = [keras.layers.Dense(3)(first), inner(second), keras.layers.Dense(3)(third)]
        outputs = keras.layers.Dense(2)(keras.layers.Add()(parts))
        return base({"input_1": first, "more": [second, third]}, outputs)

    x = {"input_1": X[:, :1], "more": [X[:, :2], X[:, 1:]]}
    check(build, fitting(x), compiling(**EAGER), "auto")


@pytest.mark.slow
def test_nested_models():
    def build(base):
        inner = normalized(keras.Model)
        inputs = keras.Input((4,))
        return base(inputs, keras.layers.Dense(2)(inner(inputs)))

    check(build, fitting(), compiling(**EAGER))


@pytest.mark.slow
def test_regularized_models_nested_as_layers():
    def build(base):
        inner = two_layers(base, kernel_regularizer=keras.regularizers.L2(1 / 32))
        inputs = keras.Input((4,))
        return base(inputs, keras.layers.Dense(2)(inner(inputs)))

    check(build, fitting(), compiling(**EAGER))


@only_on("tensorflow", "jax", reason="Keras has no sparse tensors on torch")
def test_sparse_inputs():
    tf = pytest.importorskip("tensorflow")

    def build(base):
        inputs = keras.Input((4,), sparse=True)
        hidden = keras.layers.Dense(3, "tanh")(inputs)
        return base(inputs, keras.layers.Dense(2)(hidden))

    x = tf.sparse.from_dense(X * (X > 0))
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(5)
    check(build, fitting(dataset, None, batch_size=None), compiling(), "auto")


class MeanOverWords(keras.layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.reduce_mean(x, axis=1)

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], x.shape[2]), dtype=x.dtype)


@pytest.mark.slow
@only_on("tensorflow", reason="Keras has ragged tensors on TensorFlow alone")
def test_ragged_inputs():
    import tensorflow as tf

    def build(base):
        inputs = keras.Input((None,), dtype="int32", ragged=True)
        x = MeanOverWords()(keras.layers.Embedding(5, 3)(inputs))
        return base(inputs, keras.layers.Dense(2)(x))

    lengths = 1 + np.arange(SIZE) % 4
    words = tf.RaggedTensor.from_row_lengths(draw.integers(5, size=lengths.sum()), lengths)
    dataset = tf.data.Dataset.from_tensor_slices((words, Y)).batch(5)
    check(build, fitting(dataset, None, batch_size=None), compiling())


def embedding(base):
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(6, 3)(inputs))
    return base(inputs, keras.layers.Dense(2)(x))


WORDS = draw.integers(6, size=(SIZE, 4))


@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, sgd, keras.optimizers.RMSprop])
def test_embedding_with_zero_beta_equals_plain_keras(optimizer):
    # Keras's optimizers depend on how rows repeat in a sparse gradient: they must repeat as before.
    check(embedding, fitting(WORDS), compiling(**EAGER, optimizer=optimizer), literal=False)


def test_embedding():
    check(embedding, fitting(WORDS), compiling(**EAGER))


@only_on("tensorflow", reason="gradients are sparse on TensorFlow alone")
def test_sparse_gradients_stay_sparse():
    import tensorflow as tf

    seen = []

    class Spy(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.extend(type(g) for g in grads)
            return super().apply(grads, trainable_variables)

    model = embedding(RegularizedModel)
    model.compile(Spy(1 / 8), "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    model.fit(WORDS, Y, verbose=0)
    assert seen[0] is tf.IndexedSlices and tf.IndexedSlices not in seen[1:3]


# State


@pytest.mark.slow
def test_state_advances_once_per_step():
    """Batch-norm statistics, seeds, metrics of layers and of the model."""
    check(normalized, fitting(), compiling(metrics=["mae"]))


@pytest.mark.parametrize("mode", [EAGER, {}], ids=["eager", "graph"])
@pytest.mark.parametrize("num_perturbed", [None, 1])
@pytest.mark.parametrize("main", ["full_batch", "sub_batches"])
def test_seeds_advance_once_per_step_whatever_the_main_gradient(main, num_perturbed, mode):
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2, main, num_perturbed)
    compile = compiling(**mode)
    ours, _ = trained(RegularizedModel, normalized, fitting(), compile, regularizer=regularizer)
    plain, _ = trained(keras.Model, normalized, fitting(), compile)
    seeds = [
        [v.numpy() for v in model.non_trainable_variables if "seed" in v.path]
        for model in (ours, plain)
    ]
    assert len(seeds[0]) == 2
    assert_same(*seeds)


@only_on("tensorflow", "torch", reason="Keras cannot update metrics in a layer on JAX")
def test_metrics_of_layers_count_each_example_once_whatever_beta():
    model = normalized(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    model.fit(X, Y, 5, verbose=0)
    metrics = [layer.mean for layer in model.layers if isinstance(layer, Measured)]
    assert [float(metric.count.value) for metric in metrics] == [SIZE]


@pytest.mark.parametrize("main", ["full_batch", "auto", "sub_batches"])
def test_metrics_count_each_example_once(main):
    model = two_layers(RegularizedModel)
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2, main)
    metric = keras.metrics.MeanSquaredError()
    model.compile(sgd(), "mse", metrics=[metric], regularizer=regularizer)
    model.fit(X, Y, 5, verbose=0)
    assert float(metric.count.value) == SIZE


# A drop-in


@pytest.mark.slow
def test_evaluate_and_its_like_return_what_keras_returns():
    def run(model):
        model.fit(X, LABELS, verbose=0)
        results = {
            "evaluate": model.evaluate(X, LABELS, verbose=0),
            "train_on_batch": model.train_on_batch(X, LABELS),
            "test_on_batch": model.test_on_batch(X, LABELS),
            **model.evaluate(X, LABELS, verbose=0, return_dict=True),
        }
        assert [len(results[k]) for k in list(results)[:3]] == [2, 2, 2]
        assert model.metrics_names == ["loss", "compile_metrics"]
        assert [m.name for m in model.metrics] == ["loss", "compile_metrics"]
        return {**results, "predict": model.predict(X, verbose=0)}

    compile = compiling(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    check(classifier, run, compile, literal=False)


def test_no_regularizer_is_plain_keras():
    fit, compile = fitting(epochs=2), compiling(metrics=["mae"])
    ours, logs = trained(RegularizedModel, normalized, fit, compile, regularizer=None)
    plain, plain_logs = trained(keras.Model, normalized, fit, compile)
    assert_same(logs, plain_logs)
    assert_same(variables(ours), variables(plain))
    assert ours.regularizer is None


def test_closed_gate_is_plain_keras_to_the_bit():
    def build(base):
        model = normalized(base)
        model.regularizer_active = False
        return model

    fit, compile = fitting(epochs=2), compiling(metrics=["mae"])
    ours, logs = trained(RegularizedModel, build, fit, compile)
    plain, plain_logs = trained(keras.Model, build, fit, compile)
    assert np.isnan(logs.pop("infomcr_reg")).tolist() == [True, True]
    assert_same(logs, plain_logs)
    assert_same(variables(ours), variables(plain))


@only_on("tensorflow", "torch", reason="Keras trains without a loss on JAX, towards nothing")
def test_model_without_a_loss():
    for main in ("full_batch", "auto"):
        model = two_layers(RegularizedModel)
        model.compile("sgd", regularizer=SubBatchPerturbation(main_gradient=main))
        before = weights_of(model)
        with pytest.raises(ValueError, match="No loss to compute"):
            model.fit(X, Y, verbose=0)
        np.testing.assert_array_equal(weights_of(model), before)


# The gate and the live beta


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

    def fit_slowly(model):
        model.values = []
        steer = Call(lambda m, i: set_beta(m, betas[i]))
        return fitting(batch_size=2, callbacks=[steer])(model)

    regularizer = SubBatchPerturbation(ALPHA, BETA, 2)
    compile = compiling(**mode)
    ours, _ = trained(RegularizedModel, two_layers, fit, compile, regularizer=regularizer)
    slow, _ = trained(literal_base(), two_layers, fit_slowly, lambda: eagerly(compile()))
    plain, _ = trained(keras.Model, two_layers, fitting(batch_size=2), compile)
    effect = np.linalg.norm(weights_of(slow) - weights_of(plain))
    assert np.linalg.norm(weights_of(ours) - weights_of(slow)) <= 1e-9 * effect


WHEN = {"opened": [False, True, True], "closed": [True, False, False], "both": [True, False, True]}


@pytest.mark.parametrize(("callback", "mode"), [(Call, {}), (CallAfter, {}), (Call, EAGER)])
@pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
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


@only_on("tensorflow", "jax", reason="nothing is traced on torch")
def test_live_beta_is_not_retraced():
    counts = count_traces(Call(lambda model, batch: set_beta(model, 1.0 + batch)))
    assert counts[0] == counts[1] == counts[2]


@only_on("tensorflow", "jax", reason="nothing is traced on torch")
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


# Logs


def test_log_is_written_every_epoch(tmp_path):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    gate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(model, "regularizer_active", epoch == 1)
    )
    path = tmp_path / "log.csv"
    history = model.fit(
        X, Y, 5, 3, 0, callbacks=[keras.callbacks.CSVLogger(path), gate], validation_data=(X, Y)
    ).history
    assert np.isfinite(history["infomcr_reg"]).tolist() == [False, True, False]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert np.isfinite([float(r["infomcr_reg"]) for r in rows]).tolist() == [False, True, False]


def test_log_is_seen_by_callbacks_and_by_the_progress_bar(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    seen = []
    spy = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    history = model.fit(X, Y, callbacks=spy, verbose=2).history
    assert seen[0]["infomcr_reg"] == history["infomcr_reg"][0] > 0
    assert "infomcr_reg" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_the_progress_bar_shows_the_regulariser_in_the_epochs_in_which_it_acts(verbose, capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    gate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(model, "regularizer_active", epoch == 1)
    )
    settings = {"epochs": 3, "callbacks": gate, "validation_data": (X, Y), "verbose": verbose}
    history = model.fit(X, Y, **settings).history
    shown = capsys.readouterr().out.split("Epoch ")[1:]
    assert ["infomcr_reg" in epoch for epoch in shown] == [False, True, False]
    assert all("val_loss" in epoch for epoch in shown)
    assert np.isnan(history["infomcr_reg"]).tolist() == [True, False, True]


def test_the_progress_bar_shows_a_regulariser_that_is_not_finite(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    with pytest.warns(UserWarning, match="The regulariser is not finite"):
        model.fit(np.full_like(X, np.nan), Y, verbose=2)
    assert "infomcr_reg: nan" in capsys.readouterr().out


def test_the_progress_bar_stands_where_the_user_wants_it(capsys):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    model.fit(X, Y, callbacks=[keras.callbacks.ProgbarLogger()], verbose=2)
    assert capsys.readouterr().out.count("infomcr_reg") == 1
    model.fit(X, Y, verbose=0)
    assert capsys.readouterr().out == ""


def test_the_progress_bar_makes_no_callback_wait(monkeypatch):
    """Keras calls callbacks in the background unless one of the user's forbids it."""
    lists, make = [], keras.callbacks.CallbackList.__init__

    def noting(self, *args, **kwargs):
        make(self, *args, **kwargs)
        lists.append(self)

    monkeypatch.setattr(keras.callbacks.CallbackList, "__init__", noting)
    for base, ours in ((RegularizedModel, {"regularizer": SubBatchPerturbation(0.1, 1, 2)}),
                       (keras.Model, {})):  # fmt: skip
        model = two_layers(base)
        model.compile(sgd(), "mse", **ours)
        model.fit(X, Y, verbose=2)
    assert lists[0]._async_train == lists[1]._async_train


def test_log_with_a_callback_list_of_the_users():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(ALPHA, BETA, 2))
    for _ in range(2):
        callbacks = keras.callbacks.CallbackList(add_history=True, model=model, epochs=1)
        history = model.fit(X, Y, callbacks=callbacks, verbose=0).history
        assert len(history["infomcr_reg"]) == 1


# Warnings


def count_user_warnings(warned):
    return sum(issubclass(w.category, UserWarning) for w in warned)


def test_train_step_without_the_inherited_one_warns():
    class Net(RegularizedModel):
        def train_step(self, *args):
            return keras.Model.train_step(self, *args)

    model = two_layers(Net)
    model.compile(sgd(), "mse")
    with pytest.warns(UserWarning, match="The regulariser did not act.*Call `super") as warned:
        model.fit(X, Y, epochs=2, verbose=0)
    assert count_user_warnings(warned) == 1


def test_more_sub_batches_than_examples_warns_once():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6))
    message = "No batch held as many examples as there are sub-batches.*num_sub_batches=6"
    with pytest.warns(UserWarning, match=message) as warned:
        model.fit(X, Y, 5, epochs=2, verbose=0)
        model.fit(X, Y, 5, verbose=0)
    assert count_user_warnings(warned) == 1


def test_one_batch_large_enough_does_not_warn():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6))
    model.fit(X, Y, 6, verbose=0)  # a warning is an error here


def test_closed_gate_does_not_warn():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6))
    model.regularizer_active = False
    model.fit(X, Y, 5, verbose=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_warn_once(value):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=2))
    x = X.copy()
    x[3] = value
    with pytest.warns(UserWarning, match=r"not finite.*Received: infomcr_reg=nan") as warned:
        model.fit(x, Y, 5, epochs=2, verbose=0)
    assert count_user_warnings(warned) == 1
