"""Losses that are computed for many examples at once, against each example alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from frameworks import BACKEND, jacobian, numpy
from keras import layers, losses, ops
from parameters import with_slow

from keras_infomcr import backend
from keras_infomcr.flatness import fisher_trace, hessian_trace
from keras_infomcr.flatness.loss.measured_loss import resolved_loss
from keras_infomcr.flatness.per_example.model_trial_grams import model_trial_grams
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.objective import Objective

EPSILON = np.finfo("float64").eps
COUNT, LENGTH, WIDTH, NUM_CLASSES = 4, 5, 6, 3
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(COUNT, WIDTH))
SEQUENCES = RNG.normal(size=(COUNT, LENGTH, WIDTH))
IMAGES = SEQUENCES.reshape(COUNT, LENGTH, WIDTH // 2, 2)
# The last of each line may be masked; no two examples have as many others.
TOKENS = np.array([[4, 1, 2, 3, 5], [2, 0, 1, 1, 0], [3, 3, 0, 0, 0], [1, 4, 4, 2, 0]])
CLASSES = RNG.integers(0, NUM_CLASSES, (COUNT, LENGTH))
PROBABILITIES = RNG.dirichlet(np.ones(NUM_CLASSES), COUNT)


@pytest.fixture(autouse=True)
def eagerly(monkeypatch):
    """Evaluate what would be compiled: the numbers are the same, and sooner there."""
    if BACKEND == "jax":  # which compiles each operation then
        return
    monkeypatch.setattr(backend, "compiled", lambda function: function)
    by_example = backend.gradients_by_example
    monkeypatch.setattr(
        backend, "gradients_by_example", lambda function, compiled: by_example(function, False)
    )


def settings(chunk_size=None):
    return TrialSettings(
        num_examples=COUNT, num_trials=1, training=False, chunk_size=chunk_size,
        normalize_softmax=False, softmax_scale=0.04, seed=0,
    )  # fmt: skip


def trial_grams(model, x, y, **kwargs):
    return model_trial_grams(model, resolved_loss(model), x, y, settings(**kwargs))


def measured(model, x, y, **kwargs):
    """Return the values of the examples, and the Gram matrix of their gradients."""
    objective = Objective(model)
    context = objective.weights(), objective.state()
    found = trial_grams(model, x, y, **kwargs)(context, (x, y), backend.devices(model)[0])
    return found[0], found[1].sum(axis=0)


def of_each_alone(model, x, y, alone):
    """Return the same of a function of the labels and outputs of one example."""
    examples = [keras.tree.map_structure(lambda a, i=i: a[i : i + 1], (x, y)) for i in range(COUNT)]

    def values():
        return ops.stack([alone(y_i, model(x_i)) for x_i, y_i in examples])

    rows = jacobian(values, model.trainable_variables)
    return numpy(values()), rows @ rows.T


def assert_agree(found, expected, epsilon=EPSILON):
    """Assert equality to a thousand roundings, many more than the sums have terms."""
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e3 * epsilon * np.max(np.abs(other)))


def vectors(units=NUM_CLASSES, activation=None):
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, layers.Dense(units, activation)(layers.Dense(4, "tanh")(inputs)))


def sequences(activation=None):
    inputs = keras.Input((LENGTH, WIDTH))
    hidden = layers.Dense(4, "tanh")(inputs)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES, activation)(hidden))


def images():
    inputs = keras.Input((LENGTH, WIDTH // 2, 2))
    hidden = layers.Conv2D(3, 2, padding="same", activation="tanh")(inputs)
    return keras.Model(inputs, layers.Conv2D(2, 2, padding="same")(hidden))


def masked(activation=None):
    inputs = keras.Input((LENGTH,), dtype="int32")
    hidden = layers.Embedding(6, 4, mask_zero=True)(inputs)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES, activation)(hidden))


def two_outputs():
    inputs = keras.Input((WIDTH,))
    outputs = layers.Dense(2, name="a")(inputs), layers.Dense(NUM_CLASSES, name="b")(inputs)
    return keras.Model(inputs, list(outputs))


def dict_outputs():
    model = two_outputs()
    return keras.Model(model.input, dict(zip("ab", model.outputs)))


@dataclasses.dataclass
class Case:
    """What is compiled, and the loss of one example from Keras's own losses.

    Attributes:
        model: Function of no arguments.
        x: Array.
        y: Structure of arrays.
        loss: Function of no arguments, for losses compute in the precision they are made under.
        alone: Function of the labels and outputs of one example; by default the loss itself.
        weights: The `loss_weights`.
        epsilon: Float, the rounding of the loss.
    """

    model: Callable
    x: np.ndarray
    y: Any
    loss: Callable
    alone: Callable | None = None
    weights: Any = None
    epsilon: float = EPSILON

    def compiled(self):
        model = self.model()
        model.compile("sgd", self.loss(), loss_weights=self.weights)
        return model

    def loss_alone(self):
        return self.alone or losses.get(self.loss())


def sparse(**kwargs):
    return losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def sum_of_two(y, outputs):
    return 0.5 * losses.MeanSquaredError()(y[0], outputs[0]) + 2 * sparse()(y[1], outputs[1])


def by_name(y, outputs):
    return sum_of_two([y["a"], y["b"]], [outputs["a"], outputs["b"]])


def by_name_from_list(y, outputs):
    return sum_of_two([y["a"], y["b"]], outputs)


TARGETS = {"a": VECTORS[:, :2], "b": CLASSES[:, 0]}
ONE_HOT = np.eye(NUM_CLASSES)[CLASSES]
CASES = {
    "images": Case(images, IMAGES, np.cos(IMAGES), losses.MeanSquaredError),
    "sum": Case(
        sequences, SEQUENCES, np.cos(ONE_HOT), lambda: losses.Huber(delta=0.1, reduction="sum")
    ),
    "labels of one axis less": Case(
        lambda: vectors(1), VECTORS, VECTORS[:, 0], losses.MeanAbsoluteError
    ),
    "several labels": Case(
        vectors, VECTORS, ONE_HOT[:, 0],
        lambda: losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2),
        lambda y, outputs: losses.BinaryCrossentropy(from_logits=True)(y, outputs),
        3.0,
    ),
    "sigmoid": Case(
        lambda: vectors(activation="sigmoid"), VECTORS, ONE_HOT[:, 0], losses.BinaryCrossentropy
    ),
    "tokens": Case(sequences, SEQUENCES, CLASSES, sparse),
    "tokens of a softmax": Case(
        lambda: sequences("softmax"), SEQUENCES, CLASSES[..., None],
        losses.SparseCategoricalCrossentropy,
    ),
    "one-hot tokens": Case(
        sequences, SEQUENCES, ONE_HOT,
        lambda: losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2),
        lambda y, outputs: losses.CategoricalCrossentropy(from_logits=True)(y, outputs),
    ),
    "ignored class": Case(
        sequences, SEQUENCES, np.where(TOKENS, CLASSES, -1), lambda: sparse(ignore_class=-1)
    ),
    "along an axis": Case(
        sequences, SEQUENCES, np.cos(ONE_HOT), lambda: losses.CosineSimilarity(axis=1)
    ),
    "mask": Case(masked, TOKENS, CLASSES, sparse),
    "mask of a softmax": Case(
        lambda: masked("softmax"), TOKENS, CLASSES, losses.SparseCategoricalCrossentropy
    ),
    "sum under a mask": Case(
        masked, TOKENS, np.cos(ONE_HOT), lambda: losses.MeanSquaredError(reduction="sum")
    ),
    "weighted mean under a mask": Case(
        masked, TOKENS, ONE_HOT, lambda: losses.LogCosh(reduction="mean_with_sample_weight")
    ),
    "mask and ignored class": Case(masked, TOKENS, CLASSES, lambda: sparse(ignore_class=1)),
    "two outputs": Case(
        two_outputs, VECTORS, list(TARGETS.values()), lambda: ["mse", sparse()], sum_of_two,
        [0.5, 2.0],
    ),
    "outputs in a dict": Case(
        dict_outputs, VECTORS, TARGETS, lambda: {"a": "mse", "b": sparse()}, by_name,
        {"a": 0.5, "b": 2.0},
    ),
    "labels in a dict": Case(
        two_outputs, VECTORS, TARGETS, lambda: {"a": "mse", "b": sparse()}, by_name_from_list,
        {"a": 0.5, "b": 2.0},
    ),
    "an output without loss": Case(
        two_outputs, VECTORS, TARGETS["a"], lambda: ["mse", None],
        lambda y, outputs: losses.MeanSquaredError()(y, outputs[0]),
    ),
}  # fmt: skip
# On top of the table, all other losses that are known.
LISTED = {
    name: Case(lambda: vectors(activation="softmax"), VECTORS, PROBABILITIES, lambda n=name: n)
    for name in ("MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Hinge",
                 "SquaredHinge", "CategoricalHinge", "KLDivergence", "Poisson",
                 "BinaryFocalCrossentropy", "CategoricalFocalCrossentropy")
}  # fmt: skip
LISTED["CTC"] = Case(
    sequences, SEQUENCES, np.array([[1], [2], [2], [1]]), losses.CTC,
    epsilon=np.finfo("float32").eps,  # in which TensorFlow computes it
)  # fmt: skip
ALL = CASES | LISTED
# Repeats of others of the table.
REPEATS = ("mask and ignored class", "mask of a softmax", "weighted mean under a mask",
           "sum under a mask", "outputs in a dict", "labels in a dict", "one-hot tokens",
           "tokens of a softmax", "several labels", "images", "along an axis")  # fmt: skip
PARAMS = with_slow(ALL, *LISTED, *REPEATS)


@pytest.mark.parametrize("name", PARAMS)
def test_values_and_gradients_are_those_of_each_example_alone(float64, name):
    case = ALL[name]
    model = case.compiled()
    found = trial_grams(model, case.x, case.y)
    assert found.values.together
    assert_agree(
        measured(model, case.x, case.y),
        of_each_alone(model, case.x, case.y, case.loss_alone()),
        case.epsilon,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_single_examples_give_the_same(float64, name):
    case = ALL[name]
    model = case.compiled()
    one_by_one = trial_grams(model, case.x, case.y, chunk_size=1)
    assert not one_by_one.values.together
    assert_agree(
        measured(model, case.x, case.y), measured(model, case.x, case.y, chunk_size=1), case.epsilon
    )


class Fourth(losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return ops.mean((y_true - y_pred) ** 4, axis=-1)


class Twice(losses.MeanSquaredError):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class Renamed(losses.MeanSquaredError):
    def get_config(self):
        return {}


class OwnLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) ** 2


def own_loss():
    model = vectors()
    return OwnLoss(model.input, model.output)


def without_axis():
    """Return a model of one number an example."""
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, ops.squeeze(layers.Dense(1)(inputs), -1))


def mean_square(y_true, y_pred):
    return ops.mean((y_true - y_pred) ** 2)


@pytest.mark.parametrize(
    ("model", "y", "loss", "together"),
    [
        (vectors, PROBABILITIES, Renamed, True),
        pytest.param(vectors, PROBABILITIES, Fourth, False, marks=pytest.mark.slow),
        (vectors, PROBABILITIES, Twice, False),
        (vectors, PROBABILITIES, lambda: mean_square, False),
        (vectors, PROBABILITIES, losses.Dice, False),
        (own_loss, PROBABILITIES, lambda: "mse", False),
        (without_axis, VECTORS[:, 0], lambda: "mse", False),  # means over the last axis: the batch
        (vectors, VECTORS[:, 0], lambda: "mse", False),  # labels that meet outputs, not examples
    ],
    ids=["own config", "own call", "own reduction", "function", "dice", "own compute_loss",
         "no axis", "one label"],
)  # fmt: skip
def test_what_is_known_of_losses(float64, model, y, loss, together):
    """The value of whatever is not known comes from single examples, as Keras computes it."""
    model = model()
    model.compile("sgd", loss())
    assert trial_grams(model, VECTORS, y).values.together == together

    def alone(y, outputs):
        return model.compute_loss(None, ops.convert_to_tensor(y), outputs)

    assert_agree(measured(model, VECTORS, y), of_each_alone(model, VECTORS, y, alone))


class Centred(layers.Layer):
    """Takes the mean of the batch away."""

    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0) / 2


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_models_that_couple_examples_are_found_whatever_the_size_of_the_loss(float64, scale):
    inputs = keras.Input((WIDTH,))
    outputs = layers.Rescaling(scale)(Centred()(layers.Dense(NUM_CLASSES)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    y = scale * PROBABILITIES
    assert_agree(
        measured(model, VECTORS, y),
        of_each_alone(model, VECTORS, y, losses.MeanSquaredError()),
    )


def test_losses_that_keras_counts_stay_as_they_were(float64):
    case = CASES["two outputs"]
    model = case.compiled()
    model.run_eagerly = True
    model.fit(case.x, case.y, verbose=0)
    model.run_eagerly = False
    before = [numpy(v).copy() for v in model.metrics_variables]
    assert len(before) == 6  # the total and the count of the loss, and of each of the two
    fisher_trace(model, case.x, case.y, num_examples=COUNT, num_trials=1)
    np.testing.assert_equal([numpy(v) for v in model.metrics_variables], before)


@pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
def test_labels_in_a_dict_need_no_training_step_first():
    """Keras brings them into the form of the outputs before it chooses the losses."""
    case = CASES["labels in a dict"]
    found = []
    for y in (case.y, list(case.y.values())):
        keras.utils.set_random_seed(0)
        model = case.compiled()
        found.append(hessian_trace(model, case.x, y, num_products=6, seed=0).value)
        assert [float(numpy(v)) for v in model.metrics_variables] == [0.0] * 6
    assert found[0] == pytest.approx(found[1], rel=1e-6)
