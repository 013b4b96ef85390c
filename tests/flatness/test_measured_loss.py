"""`loss=` of the measures: models whose training is their own, against the same model compiled."""

import functools

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy
from keras import layers, ops

from keras_infomcr import flatness
from keras_infomcr.callbacks import FlatnessCallback
from keras_infomcr.flatness import hessian_trace, local_energy
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.loss.measured_loss import resolved_loss

NUM_CLASSES = 3

# Small networks with random weights may be wrong about their few examples, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")


def measure(name, **settings):
    return functools.partial(getattr(flatness, name), seed=0, **settings)


MEASURES = [
    measure("hessian_trace", num_products=6),
    measure("hessian_frobenius_norm", num_products=6),
    measure("hessian_spectral_radius"),
    measure("hessian_top_eigenvalues", num_eigenvalues=2),
    measure("hessian_spectral_density", num_probes=1, num_steps=3),
    measure("local_energy", num_samples=2, reestimate=True),
    measure("local_entropy", num_samples=2),
    measure("local_entropy_gradient_norm", num_chains=2, num_steps=2),
    measure("local_learning_coefficient", num_chains=2, num_steps=2),
    measure("adaptive_sharpness", num_steps=2),
    measure("average_adaptive_sharpness", num_samples=2),
]


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 5)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)


class OwnStep(keras.Model):
    """Trains, by steps of its own, on a loss that Keras is not told of; computes none for Keras."""

    def train_step(self, *args):
        raise NotImplementedError

    def compute_loss(self, *args, **kwargs):
        raise NotImplementedError


def network(base):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = layers.BatchNormalization()(layers.Dense(4, "tanh")(inputs))
    return base(inputs, layers.Dense(NUM_CLASSES, activity_regularizer="l2")(hidden))


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(loss):
    model = network(keras.Model)
    model.compile("sgd", loss)
    return model


# They share the products of the trace, and the chains of the local entropy: CI alone tries them.
SLOW = MEASURES[1:5] + MEASURES[7:9]
PARAMS = [
    pytest.param(m, id=m.func.__name__, marks=[pytest.mark.slow] * (m in SLOW)) for m in MEASURES
]


@pytest.mark.parametrize("found_by", PARAMS)
def test_a_model_with_a_step_of_its_own_is_measured_as_if_compiled(data, found_by):
    own, loss = network(OwnStep), cross_entropy()
    own.compile("adam")
    result = found_by(own, *data, loss=loss)
    expected = found_by(compiled(loss), *data)
    # The same graph on the same numbers; those of eigenvalues near zero are rounding.
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-4, atol=1e-6)


def per_example(y_true, y_pred):
    return ops.mean((ops.one_hot(ops.cast(y_true, "int32"), NUM_CLASSES) - y_pred) ** 2, axis=-1)


def mean(y_true, y_pred):
    return ops.mean(per_example(y_true, y_pred))


@pytest.mark.parametrize(
    "loss",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in (cross_entropy(), "mse")),
        per_example,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (mean, [per_example])),
        {"scores": per_example},
    ],
    ids=["object", "name", "function", "mean", "list", "dictionary"],
)
@pytest.mark.parametrize("has_been_compiled", [False, True])
def test_losses_of_all_kinds_that_compile_takes(data, loss, has_been_compiled):
    x, y = data
    if loss == "mse":
        y = np.eye(NUM_CLASSES, dtype="float32")[y]
    models = [network(keras.Model) for _ in range(2)]
    if isinstance(loss, dict):
        models = [keras.Model(m.inputs, {"scores": m.outputs[0]}) for m in models]
        y = {"scores": y}
    model, expected = models
    if has_been_compiled:
        model.compile("sgd", "mae", loss_weights=[7.0])  # which `loss` replaces
    expected.compile("sgd", loss)
    function = LossFunction(model, loss=loss)
    found = function.loss([(x, y)], function.point())
    # Activity penalties are part of both.
    assert found == pytest.approx(expected.evaluate(x, y, verbose=0), rel=1e-5)


def test_the_student_of_a_distillation(data):
    """The labels are the teacher's logits; the loss is between two sets of logits."""

    class Distillation(keras.Model):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher
            teacher.trainable = False

        def call(self, x, training=False):
            return self.student(x, training=training)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return divergence(self.teacher(x), y_pred)

    def divergence(teacher, student):
        return keras.losses.kl_divergence(ops.softmax(teacher), ops.softmax(student))

    teacher, student = network(keras.Model), network(keras.Model)
    teacher.set_weights([1.5 * w for w in teacher.get_weights()])
    model = Distillation(student, teacher)
    model.compile("sgd")
    model(data[0])
    labels = numpy(teacher(data[0]))
    found = hessian_trace(model, data[0], labels, loss=divergence, seed=0)
    student.compile("sgd", divergence)
    expected = hessian_trace(student, data[0], labels, seed=0)
    assert found.value == pytest.approx(expected.value, rel=1e-4)


class Sampling(layers.Layer):
    """The middle of a variational autoencoder, which adds its divergence by `add_loss`."""

    def call(self, inputs):
        mean, log_variance = ops.split(inputs, 2, axis=-1)
        terms = mean**2 + ops.exp(log_variance) - 1 - log_variance
        self.add_loss(ops.mean(ops.sum(terms, axis=-1)) / 2)
        return mean


def test_what_layers_add_to_the_loss_is_part_of_it(data):
    def autoencoder(base):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        return base(inputs, layers.Dense(5)(Sampling()(layers.Dense(4)(inputs))))

    own, plain = autoencoder(OwnStep), autoencoder(keras.Model)
    plain.compile("sgd", "mse")
    x = data[0]
    found = hessian_trace(own, x, x, loss="mse", seed=0).value
    assert found == pytest.approx(hessian_trace(plain, x, x, seed=0).value, rel=1e-5)
    without = LossFunction(own, loss="mse")
    reconstruction = np.mean((numpy(own(x)) - x) ** 2)
    assert without.loss([(x, x)], without.point()) > 1.01 * reconstruction


def test_labels_and_guesses_are_those_of_the_given_loss(data):
    x, y = data
    model = compiled("mse")
    with pytest.raises(ValueError, match="`y` must hold integers from 0 to 2"):
        hessian_trace(model, x, y + 1, loss=cross_entropy())
    assert np.isfinite(local_energy(model, x, y, loss=cross_entropy(), num_samples=1).error)
    one_hot = np.eye(NUM_CLASSES, dtype="float32")[y]
    assert np.isnan(local_energy(model, x, one_hot, num_samples=1).error)
    model.set_weights([1e3 * w for w in model.get_weights()])
    hessian_trace(model, x, one_hot)  # no cross-entropy: no guess to compare with
    with pytest.warns(UserWarning, match="The model does not fit"):
        hessian_trace(model, x, y, loss=cross_entropy())


def test_errors_name_the_argument(data):
    own = network(OwnStep)
    own.compile("adam")
    with pytest.raises(ValueError, match=r"or the measure be given one.*pass `loss=\.\.\.`"):
        hessian_trace(own, *data)
    with pytest.raises(ValueError, match=r"reduction.*pass `loss=\.\.\.` to the measure"):
        hessian_trace(own, *data, loss=keras.losses.MeanSquaredError(reduction="sum"))


def test_the_stand_in_of_a_loss_is_the_same_as_long_as_the_model_lives():
    model = network(keras.Model)
    assert resolved_loss(model, per_example) is resolved_loss(model, per_example)
    assert resolved_loss(model, [per_example]) is resolved_loss(model, [per_example])
    assert resolved_loss(model, mean) is not resolved_loss(model, per_example)
    model.compile("sgd", "mse")
    assert resolved_loss(model) is model
    assert len(model.layers) == 4  # the stand-in is none of them


def test_a_callback_measures_a_model_with_a_step_of_its_own(data):
    class Steps(OwnStep):
        def train_step(self, *args):
            logs = {"loss": ops.zeros(())}
            return (logs, args[0]) if BACKEND == "jax" else logs  # JAX's takes and returns a state

    model = network(Steps)
    model.compile("adam")
    trace = measure("hessian_trace", num_products=6, loss=cross_entropy())
    logs = model.fit(*data, callbacks=[FlatnessCallback(data, [trace])], verbose=0).history
    assert logs["hessian_trace"] == [pytest.approx(trace(model, *data).value, rel=1e-5)]


def test_a_loss_that_cannot_be_hashed(rng):
    class Squares:
        __hash__ = None
        calls = 0

        def __call__(self, y_true, y_pred):
            self.calls += 1
            return ops.mean(ops.square(y_true - y_pred), axis=-1)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 2))
    settings = {"num_products": 6, "seed": 0}
    expected = hessian_trace(model, x, y, loss="mse", **settings)
    loss = Squares()
    found = [hessian_trace(model, x, y, loss=loss, **settings).value for _ in range(2)]
    # Sums in another order in float32.
    np.testing.assert_allclose(found, expected.value, rtol=1e-5)


def test_a_function_with_the_name_of_one_of_keras_is_what_it_computes(rng):
    def categorical_crossentropy(y_true, y_pred):
        return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    x, y = rng.normal(size=(8, 6)), np.eye(3)[rng.integers(0, 3, 8)]
    settings = {"num_examples": 4, "num_trials": 2, "seed": 0}
    with_logits = keras.losses.CategoricalCrossentropy(from_logits=True)
    expected = flatness.fisher_trace(model, x, y, loss=with_logits, **settings)
    found = flatness.fisher_trace(model, x, y, loss=categorical_crossentropy, **settings)
    assert found.value == pytest.approx(expected.value, rel=1e-4)  # gradients in float32
