"""What every rule owes to a user of `fit`; a rule joins by one line in `toy_rules.RULES`.

Least squares on six examples, y = X w* without noise: at w* the gradient of each example is zero.
"""

import inspect
import re
import textwrap

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy, only_on
from keras import ops
from parameters import slow_but
from toy_rules import CUTTING, DRAWING, RULES, STEPPING, VARIANTS, Anchored

from keras_infomcr import RegularizedModel, regularizers
from keras_infomcr.objective import Objective
from keras_infomcr.regularizers import Regularizer, SharpnessAware, Step, WeightNoise

RATE, STRENGTH = 1 / 16, 0.5
# Without a graph where that is the faster way: JAX compiles each operation by itself then.
EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
draw = np.random.default_rng(3)
X = draw.normal(size=(6, 3))
TRUE = draw.normal(size=(3, 2))
Y = X @ TRUE
START = draw.normal(size=(3, 2))


def with_rules(*fast):
    """Try every rule; all but those named are left to CI."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [n if n in fast else pytest.param(n, marks=slow) for n in RULES]
    )


with_every_rule = with_rules(*RULES)
with_rule = with_rules(*(RULES.keys() - VARIANTS))
# Tests of `SubBatchPerturbation` alone do much of the same: where one other rule shows what there
# is to see, CI alone tries it here.
with_sam = with_rules("sam")
# The memory of noise moves with each step, the other rules that are tried first have none.
with_noise = with_rules("weight_noise")


def linear(base=RegularizedModel):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = base(inputs, keras.layers.Dense(2, use_bias=False)(inputs))
    model.set_weights([START])
    return model


def network(base=RegularizedModel, dropout=0.5, name=None):
    """Return a net in which each step moves moving statistics and seeds.

    Rules whose training gradient is the mean over slices are plain Keras without these alone.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, "tanh")(inputs)
    if name in CUTTING:
        return base(inputs, keras.layers.Dense(2)(hidden))
    hidden = keras.layers.BatchNormalization()(hidden)
    return base(inputs, keras.layers.Dense(2)(keras.layers.Dropout(dropout, seed=1)(hidden)))


def compiled(model, rule=None, optimizer=None, **kwargs):
    if isinstance(model, RegularizedModel):
        kwargs["regularizer"] = rule
    model.compile(optimizer or keras.optimizers.SGD(RATE), "mse", **kwargs)
    return model


def fitted(model, epochs=2, batch_size=4, rows=slice(None), **kwargs):
    history = model.fit(
        X[rows], Y[rows], batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **kwargs
    ).history
    return model, history


def everything(model):
    optimizer = [v for v in model.optimizer.variables if "learning_rate" not in v.path]
    return [numpy(v) for v in (*model.variables, *optimizer)]


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, **tolerance)


def gradient(w, x, y):
    """Return the gradient of the mean over examples and outputs of (x w - y)^2."""
    return (2 / (2 * len(x)) * x.T @ (x @ w.reshape(3, 2) - y)).ravel()


@with_every_rule
def test_steps_are_those_of_the_oracle(name, float64):
    """Three steps over batches of four and two; each rounds some 1e-15."""
    make, oracle = RULES[name]
    rule = make(STRENGTH)
    w, memory = START.ravel(), None
    for rows in (slice(0, 4), slice(4, 6), slice(0, 4)):
        direction, memory = oracle(rule, gradient, w, X[rows], Y[rows], memory)
        w = w - RATE * direction
    model = compiled(linear(), rule, **EAGER)
    fitted(model, 1)
    model.train_on_batch(X[:4], Y[:4])
    np.testing.assert_allclose(model.get_weights()[0].ravel(), w, rtol=0, atol=1e-13)


@with_rule
def test_the_minimum_of_a_quadratic_is_reached(name, float64):
    rule = RULES[name][0](STRENGTH)
    if isinstance(rule, SharpnessAware):
        rule.rho = 1e-3  # about it SAM goes on bouncing at a distance of this order
    if isinstance(rule, WeightNoise):
        rule.std = 1e-4  # which relates the distance that is left to the weights, of order one
    model = compiled(linear(), rule, keras.optimizers.SGD(0.3))
    data = array(X), array(Y)
    for _ in range(200):
        model.train_on_batch(*data)
    # Steps contract the distance to w* by 1 - 0.3 times the smallest curvature, or by the rate at
    # which a mean of the weights follows them, whichever is nearer to 1.
    np.testing.assert_allclose(model.get_weights()[0], TRUE, atol=1e-3)


@with_sam
@pytest.mark.parametrize(
    "mode", [{}, pytest.param(EAGER, marks=pytest.mark.slow)], ids=["compiled", "eager"]
)
def test_zero_strength_is_plain_keras(name, mode):
    if name in STEPPING:
        pytest.skip("A test of the rule's own compares it with several steps of Keras.")
    ours, logs = fitted(compiled(network(name=name), RULES[name][0](0.0), metrics=["mae"], **mode))
    plain, expected = fitted(compiled(network(keras.Model, name=name), metrics=["mae"], **mode))
    # The means over slices round otherwise. XLA may fuse the same operations otherwise.
    exact = name not in CUTTING and BACKEND != "jax"
    tolerance = {"atol": 0 if exact else 1e-6}
    assert_same(ours, plain, **tolerance)
    rule = ours.regularizer
    assert logs.keys() - expected.keys() == {rule.log_key, *rule.further_logs}
    for key in expected:
        np.testing.assert_allclose(logs[key], expected[key], rtol=0, **tolerance)


@with_rule
def test_states_and_metrics_move_once_a_step(name):
    if name in STEPPING:
        pytest.skip("A test of the rule's own compares it with several steps of Keras.")
    strength = 0.0 if name in DRAWING else STRENGTH  # with noise the metrics are those of the noise
    model = compiled(network(name=name), RULES[name][0](strength), metrics=["mae"], **EAGER)
    plain = compiled(network(keras.Model, name=name), metrics=["mae"], **EAGER)
    (ours,), (theirs,) = ([m.train_on_batch(X, Y, return_dict=True)] for m in (model, plain))
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
    for a, b in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-6)


@with_rule
def test_sample_weights_of_zero_leave_examples_out(name, float64):
    """With the weights 1, 1, 1, 0 and 4/3 the examples that are left count as three of three."""
    rule = RULES[name][0]
    some = compiled(linear(), rule(STRENGTH), **EAGER)
    weights = np.array([4 / 3, 4 / 3, 4 / 3, 0])
    some.regularizer.num_sub_batches = 1
    some.train_on_batch(X[:4], Y[:4], weights)
    three = compiled(linear(), rule(STRENGTH), **EAGER)
    three.regularizer.num_sub_batches = 1
    three.train_on_batch(X[:3], Y[:3])
    assert_same(some, three, atol=1e-12)


OPTIMIZERS = {
    "accumulation": lambda: keras.optimizers.SGD(RATE, gradient_accumulation_steps=2),
    "moving average": lambda: keras.optimizers.SGD(RATE, use_ema=True, ema_overwrite_frequency=1),
    "clipping": lambda: keras.optimizers.SGD(RATE, global_clipnorm=0.1),
}


@with_rule
@pytest.mark.parametrize(
    "kind",
    [
        "accumulation",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("moving average", "clipping")),
    ],
)
def test_optimizers_get_the_gradients_of_the_oracle(name, kind, float64):
    """The optimizer alone, fed with the oracle's directions, gives the same weights."""
    make, oracle = RULES[name]
    rule = make(STRENGTH)
    model = compiled(linear(), rule, OPTIMIZERS[kind](), **EAGER)
    variable = keras.Variable(START)
    optimizer = OPTIMIZERS[kind]()
    optimizer.build([variable])
    memory = None
    for rows in (slice(0, 4), slice(2, 6)):
        w = numpy(variable).ravel()
        direction, memory = oracle(rule, gradient, w, X[rows], Y[rows], memory)
        optimizer.apply([array(direction.reshape(3, 2), "float64")], [variable])
        model.train_on_batch(X[rows], Y[rows])
    # Keras takes some numbers of an optimizer, such as the norm to clip to, through float32.
    np.testing.assert_allclose(model.get_weights()[0], numpy(variable), rtol=0, atol=1e-7)


@with_rule
def test_mixed_precision_follows_float32(name):
    """bfloat16 rounds the main pass by 2^-9 at several places; two steps move by less than 1."""
    full, _ = fitted(compiled(linear(), RULES[name][0](STRENGTH), **EAGER), 1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    half, _ = fitted(compiled(linear(), RULES[name][0](STRENGTH), **EAGER), 1)
    np.testing.assert_allclose(half.get_weights()[0], full.get_weights()[0], atol=1e-2)


@with_sam
def test_compiled_by_xla(name):
    if BACKEND == "torch":
        pytest.skip("torch.compile takes half a minute a model")
    if BACKEND == "tensorflow" and name in DRAWING:
        pytest.skip("TensorFlow draws other numbers under XLA")
    eager, _ = fitted(compiled(linear(), RULES[name][0](STRENGTH), **EAGER))
    jitted, _ = fitted(compiled(linear(), RULES[name][0](STRENGTH), jit_compile=True))
    assert_same(jitted, eager, atol=1e-5)


@with_noise
@pytest.mark.parametrize(
    "kind", ["model.keras", pytest.param("model.weights.h5", marks=pytest.mark.slow)]
)
def test_resumes_in_the_middle(name, kind, tmp_path):
    """Without dropout, whose seeds Keras does not keep in its files."""

    def fresh():
        return compiled(network(dropout=0.0), RULES[name][0](STRENGTH), **EAGER)

    whole, _ = fitted(fresh(), 4)
    half, _ = fitted(fresh(), 2)
    path = tmp_path / kind
    if kind == "model.keras":
        half.save(path)
        resumed = keras.models.load_model(path)
    else:
        half.save_weights(path)
        resumed = fresh()
        resumed.load_weights(path)
    fitted(resumed, 2)
    for a, b in zip(resumed.regularizer.memory, whole.regularizer.memory, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    assert_same(resumed, whole, atol=0)


@with_noise
def test_weight_files_are_those_of_a_plain_model(name, tmp_path):
    ours, _ = fitted(compiled(network(), RULES[name][0](STRENGTH), **EAGER), 1)
    ours.save_weights(tmp_path / "ours.weights.h5")
    plain = network(keras.Model)
    plain.load_weights(tmp_path / "ours.weights.h5")
    for a, b in zip(plain.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fitted(compiled(plain, **EAGER), 1)  # so that its file holds an optimizer, too
    plain.save_weights(tmp_path / "plain.weights.h5")
    ours.load_weights(tmp_path / "plain.weights.h5")


@with_noise
def test_memory_is_no_weight_and_no_metric(name):
    model = compiled(network(), RULES[name][0](STRENGTH), **EAGER)
    fitted(model, 1)
    ids = {id(v) for v in (*model.weights, *model.variables)}
    assert not ids & {id(v) for v in model.regularizer.memory}
    assert set(model.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss"}


def rows_of_one_device(name):
    """Return the examples in the order in which one device meets what two replicas share."""
    # Three slices of one example each on both replicas.
    return [0, 3, 1, 4, 2, 5] if name in STEPPING else slice(None)


@with_sam
@only_on("tensorflow", reason="`MirroredStrategy` is TensorFlow's")
def test_two_replicas_are_one_device(name, mirrored, float64):
    if name in DRAWING:
        pytest.skip("Replicas draw other numbers; a test of the rule's own adds up what they do.")
    model, rows = compiled(linear(), RULES[name][0](STRENGTH)), rows_of_one_device(name)
    one, _ = fitted(model, 2, batch_size=6, rows=rows)
    with mirrored.scope():
        two = compiled(linear(), RULES[name][0](STRENGTH))
    fitted(two, 2, batch_size=6)
    np.testing.assert_allclose(two.get_weights()[0], one.get_weights()[0], rtol=0, atol=1e-12)
    for a, b in zip(two.regularizer.memory, one.regularizer.memory, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=1e-12)


@with_rule
@only_on("jax", reason="`keras.distribution` is JAX's")
def test_two_devices_of_jax_are_one(name, float64):
    if name in DRAWING:
        pytest.skip("Replicas draw other numbers; a test of the rule's own adds up what they do.")
    model, rows = compiled(linear(), RULES[name][0](STRENGTH)), rows_of_one_device(name)
    one, _ = fitted(model, 2, batch_size=6, rows=rows)
    devices = keras.distribution.list_devices()[:2]
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        two, _ = fitted(compiled(linear(), RULES[name][0](STRENGTH)), 2, batch_size=6)
        np.testing.assert_allclose(two.get_weights()[0], one.get_weights()[0], rtol=0, atol=1e-12)
    finally:
        keras.distribution.set_distribution(None)


@with_rule
def test_configuration_comes_back(name):
    rule = RULES[name][0](0.25)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rule))
    assert type(again) is type(rule) and again.get_config() == rule.get_config()


# The contract itself


def test_the_example_of_the_base_class_is_sharpness_aware_minimisation(float64):
    """Written from the docstring alone, the rule takes the step of the method that it names."""
    blocks = re.findall("```python\n(.*?)```", inspect.getdoc(Regularizer), re.DOTALL)
    names = {"keras": keras, "ops": ops, "Regularizer": Regularizer, "Step": Step}
    names["model"] = linear()
    exec(textwrap.dedent(blocks[0]), names)
    model = compiled(linear(), names["Uphill"](rho=0.1), **EAGER)
    model.train_on_batch(X, Y)
    w = START.ravel()
    g = gradient(w, X, Y)
    expected = w - RATE * gradient(w + 0.1 * g / np.linalg.norm(g), X, Y)
    # The rule adds 1e-12 to ||g||^2, which is of order one.
    np.testing.assert_allclose(model.get_weights()[0].ravel(), expected, rtol=0, atol=1e-12)
    history = model.fit(X, Y, verbose=0).history
    assert "uphill" in history


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ((0.0, None), TypeError, "must return a `Step`. Received: .* from Returning"),
        (Step(0.0, main=(0.0, [])), ValueError, "if, and only if, `replaces_main_pass`"),
        (Step(0.0, instead=[None]), ValueError, "`Step.instead` must be given with `Step.main`"),
        (Step(0.0, logs={"a": 1.0}), ValueError, r"`further_logs`. Received: \['a'\] for \[\]"),
        (Step(0.0, memory=[1.0]), ValueError, "Received: 1 values for 0 variables from Returning"),
        (Step(0.0, gradient=[None] * 2), ValueError, "`Step.gradient`.*2 gradients for 1 variab"),
    ],
)
def test_what_breaks_the_contract_is_said(step, error, message):
    class Returning(Regularizer):
        def __call__(self, objective, batch, memory):
            return step

        def get_config(self):
            return {"strength": 1.0}

    model = compiled(linear(), Returning(1.0), **EAGER)
    before = model.get_weights()
    with pytest.raises(error, match=message):
        model.train_on_batch(X, Y)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


class Logging(Regularizer):
    """Logs the loss of the batch by another name, and adds the penalties itself if asked."""

    further_logs = ("loss_without_penalties",)

    def __init__(self, includes_penalties):
        super().__init__(1.0)
        self.includes_penalties = includes_penalties

    def replaces_main_pass(self, model):
        return True

    def __call__(self, objective, batch, memory):
        weights = objective.weights()
        main = objective.evaluate(weights, objective.state(), batch)
        if self.includes_penalties:
            pairs = zip(main.gradients, objective.penalty_gradients(weights))
            main = main._replace(gradients=[g if p is None else g + p for g, p in pairs])
        return Step(0.0, main=main, logs={"loss_without_penalties": main.loss})

    def get_config(self):
        return {"includes_penalties": self.includes_penalties}


@pytest.mark.parametrize("itself", slow_but([True, False], True))
def test_penalties_count_once_and_further_values_are_means_over_examples(itself, float64):
    def penalised(base):
        inputs = keras.Input((3,))
        layer = keras.layers.Dense(2, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1))
        model = base(inputs, layer(inputs))
        model.set_weights([START])
        return model

    rule = Logging(itself)
    ours, logs = fitted(compiled(penalised(RegularizedModel), rule), 1)
    plain, expected = fitted(compiled(penalised(keras.Model)), 1)
    assert_same(ours, plain, atol=1e-14)
    # The metrics of the logs are float32, whose digits end at 1e-7.
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-6)
    w = START
    losses = [np.mean((X[:4] @ w - Y[:4]) ** 2)]
    w = w - RATE * (gradient(w.ravel(), X[:4], Y[:4]).reshape(3, 2) + 0.2 * w)
    losses.append(np.mean((X[4:] @ w - Y[4:]) ** 2))
    mean = (4 * losses[0] + 2 * losses[1]) / 6
    np.testing.assert_allclose(logs["loss_without_penalties"], mean, rtol=1e-6)
    ours.regularizer_active = False
    assert np.isnan(fitted(ours, 1)[1]["loss_without_penalties"][0])


@keras.saving.register_keras_serializable("keras_infomcr_tests")
class AnchoredElsewhere(Anchored):
    """Another rule, whose memory has the same shapes."""


def test_a_memory_of_another_rule_is_not_taken(tmp_path):
    model, _ = fitted(compiled(linear(), Anchored(), **EAGER), 1)
    model.save_weights(tmp_path / "a.weights.h5")
    other = compiled(linear(), AnchoredElsewhere(), **EAGER)
    other.load_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="holds the memory of another regulariser.*Anchored'"):
        fitted(other, 1)
    np.testing.assert_raises(
        AssertionError,
        np.testing.assert_array_equal,
        *(numpy(m.regularizer.memory[0]) for m in (model, other)),
    )


def test_a_rule_with_a_memory_belongs_to_one_model():
    rule = Anchored()
    first, second = (compiled(linear(), rule, **EAGER) for _ in range(2))
    first.train_on_batch(X, Y)
    second.train_on_batch(X, Y)
    with pytest.raises(ValueError, match=r"must belong to one model.*an instance of its own"):
        first.train_on_batch(X, Y)


def test_a_memory_loaded_and_saved_before_a_step_is_kept(tmp_path):
    model, _ = fitted(compiled(linear(), Anchored(), **EAGER), 1)
    for k in range(2):
        model.save(tmp_path / f"{k}.keras")
        model = keras.models.load_model(tmp_path / f"{k}.keras")
    before, _ = fitted(model, 1)
    whole, _ = fitted(compiled(linear(), Anchored(), **EAGER), 2)
    np.testing.assert_array_equal(before.get_weights()[0], whole.get_weights()[0])


def test_freezing_weights_without_compiling_makes_the_memory_anew():
    inputs = keras.Input((3,))
    first, last = keras.layers.Dense(3), keras.layers.Dense(2)
    model = compiled(RegularizedModel(inputs, last(first(inputs))), Anchored())
    model.train_on_batch(X, Y)
    first.trainable = False
    if BACKEND == "jax":
        pytest.skip("Keras's optimizer on JAX asks to compile anew.")
    for _ in range(2):
        before = [numpy(v) for v in model.regularizer.memory]
        model.train_on_batch(X, Y)
    assert len(before) == 2
    assert np.any(numpy(model.regularizer.memory[0]) != before[0])


@only_on("tensorflow", reason="other frameworks make variables before a step, or in it")
def test_an_unbuilt_model_under_xla_is_refused_where_a_memory_is_to_be_made():
    class Net(RegularizedModel):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = compiled(Net(), Anchored(), jit_compile=True)
    with pytest.raises(ValueError, match=r"must be built before.*Call the model on a batch"):
        model.train_on_batch(X, Y)


def test_precision_is_an_argument_of_the_rule():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = compiled(linear(), None)
    for float32, dtype in ((True, "float32"), (False, "bfloat16")):
        objective = Objective(model, float32)
        outputs = objective.predict(objective.weights(), objective.state(), array(X, "float32"))
        assert keras.backend.standardize_dtype(outputs.dtype) == dtype


def test_log_keys():
    assert regularizers.SubBatchPerturbation().log_key == "infomcr_reg"
    assert regularizers.EntropySGD().log_key == "entropy_sgd"
    assert Anchored().log_key == "anchored"
