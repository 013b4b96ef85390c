"""Models, data and losses that plain Keras trains with, and a regularised model therefore too."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_array_equal, only_on
from keras import layers
from parameters import slow_but

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")

# Without tracing where a graph would show nothing more; on JAX compiling takes less than it saves.
EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}

each_step = pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"main_gradient": "full_batch"},
        pytest.param({"num_perturbed": 2}, marks=pytest.mark.slow),
        pytest.param({"estimator": "hessian_vector_product"}, marks=pytest.mark.slow),
    ],
    ids=lambda a: next(iter(a.values()), "default"),
)
without_weights = pytest.mark.filterwarnings(
    "ignore:The model does not have any trainable weights", "ignore:The regulariser did not act"
)


def dense(base, units=2, **kwargs):
    inputs = keras.Input((3,))
    return base(inputs, layers.Dense(units, kernel_initializer="ones")(inputs), **kwargs)


def trained(model, x=X, y=Y, loss="mse", fit=None, **kwargs):
    """Return the logs of plain Keras, and of ours without what it adds to them."""
    model.compile(keras.optimizers.SGD(0.1), loss, **kwargs)
    history = model.fit(x, y, batch_size=5, shuffle=False, verbose=0, **(fit or {})).history
    return {key: value for key, value in history.items() if key != "infomcr_reg"}


# Shapes


@each_step
def test_gradients_of_weights_that_broadcast(arguments):
    """The kernel has a single row.

    Where TensorFlow does not know the number of examples while tracing, it loses that axis of the
    gradient.
    """
    x = np.random.default_rng(2).normal(size=(13, 4, 1)).astype("float32")
    inputs = keras.Input((4, 1))
    model = RegularizedModel(inputs, layers.Dense(8)(inputs))
    regularizer = SubBatchPerturbation(num_sub_batches=2, **arguments)
    trained(model, x, np.repeat(x, 8, axis=-1), regularizer=regularizer)
    assert model.layers[-1].kernel.shape == (1, 8)
    assert all(np.isfinite(w).all() for w in model.get_weights())


# Models without weights


class Unchanged:
    def call(self, inputs):
        return inputs


class FrozenWhenBuilt:
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, kernel_initializer="ones", trainable=False)

    def call(self, inputs):
        return self.dense(inputs)


def functional_without_weights(base):
    inputs = keras.Input((3,))
    return base(inputs, layers.Activation("relu")(inputs)[:, :2])


def mixed_with(mixin):
    """Return a function of a base class that makes a model; Keras rewrites bases of no class."""
    return lambda base: type(mixin.__name__, (mixin, base), {})()


@without_weights
@pytest.mark.parametrize("main", slow_but(["full_batch", "sub_batches"], "sub_batches"))
@pytest.mark.parametrize(
    "build",
    [mixed_with(Unchanged), mixed_with(FrozenWhenBuilt), functional_without_weights],
    ids=["unchanged", "frozen_when_built", "functional"],
)
def test_a_model_without_trainable_weights_trains_as_in_keras(build, main):
    y = X[:, : build(keras.Model)(X).shape[-1]] + 1
    regularizer = SubBatchPerturbation(main_gradient=main)
    ours, plain = build(RegularizedModel), build(keras.Model)
    assert trained(ours, y=y, metrics=["mae"], regularizer=regularizer) == trained(
        plain, y=y, metrics=["mae"]
    )
    for a, b in zip(ours.get_weights(), plain.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_trainable_weights_warns_once_that_the_regulariser_did_not_act():
    model = mixed_with(Unchanged)(RegularizedModel)
    with pytest.warns(UserWarning) as warned:
        trained(model, y=X, fit={"epochs": 2})
    messages = [str(w.message) for w in warned]
    assert sum("The regulariser did not act" in m for m in messages) == 1
    assert any("no trainable weights, or" in m for m in messages)
    if BACKEND != "jax":  # where Keras says nothing
        assert any("does not have any trainable weights" in m for m in messages)


def test_a_keras_layer_mixed_with_a_model_trains():
    """Its `call` is Keras's, yet it is no graph of layers."""

    def build(base):
        return type("Mixed", (layers.Dense, base), {})(2, kernel_initializer="ones")

    ours, plain = build(RegularizedModel), build(keras.Model)
    regularizer = SubBatchPerturbation(beta=0.0, num_sub_batches=2)
    logs = trained(ours, regularizer=regularizer, **EAGER)
    expected = trained(plain, **EAGER)
    # Sums in float32, in another order.
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-6)


# Batches without examples


def on_empty_batch(model, **kwargs):
    """Return what `train_on_batch` returns or raises, and the weights."""
    model.compile(keras.optimizers.SGD(0.1), "mse", **kwargs)
    try:
        outcome = model.train_on_batch(X[:0], Y[:0])
    except Exception as error:
        outcome = type(error)
    return outcome, model.get_weights()


@each_step
@pytest.mark.parametrize("eager", [False, True])
def test_an_empty_batch_is_what_it_is_in_keras(arguments, eager):
    mode = {"run_eagerly": True} if eager else {}
    regularizer = SubBatchPerturbation(**arguments)
    found = on_empty_batch(dense(RegularizedModel), regularizer=regularizer, **mode)
    expected = on_empty_batch(dense(keras.Model), **mode)
    assert found[0] == expected[0]
    assert_array_equal(found[1][0], expected[1][0])


@only_on("tensorflow", reason="On JAX and torch, Keras's own step fails on an empty batch.")
@each_step
def test_an_empty_batch_of_unknown_size_changes_nothing(arguments):
    model = dense(RegularizedModel)
    regularizer = SubBatchPerturbation(**arguments)
    model.compile(keras.optimizers.SGD(0.1), "mse", regularizer=regularizer)
    for size in (8, 7):  # after two sizes Keras traces a step for any
        model.train_on_batch(X[:size], Y[:size])
    before = model.get_weights()
    assert model.train_on_batch(X[:0], Y[:0]) == 0.0
    assert_array_equal(model.get_weights()[0], before[0])


# Losses in structures


def heads(base):
    inputs = keras.Input((3,))
    a, b, c = (layers.Dense(2, kernel_initializer="ones", name=name)(inputs) for name in "abc")
    return base(inputs, (a, [b, c]))


def squares(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2, axis=-1)


@pytest.mark.parametrize("main", slow_but(["auto", "sub_batches"], "sub_batches"))
def test_losses_in_nested_structures(main):
    mse = keras.losses.MeanSquaredError
    regularizer = SubBatchPerturbation(beta=0.0, num_sub_batches=2, main_gradient=main)
    for loss in ((squares, [squares, squares]), (mse(), [mse(), "mse"])):
        targets = Y, [Y + 1, Y - 1]
        logs = trained(heads(RegularizedModel), X, targets, loss, regularizer=regularizer, **EAGER)
        expected = trained(heads(keras.Model), X, targets, loss, **EAGER)
        assert list(logs) == list(expected)
        # Sums in float32, in another order where the mean of the sub-batches is taken.
        np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-6)


def test_a_sum_in_a_nested_structure_is_no_mean():
    total = keras.losses.MeanSquaredError(reduction="sum")
    regularizer = SubBatchPerturbation(num_sub_batches=2, main_gradient="sub_batches")
    with pytest.raises(ValueError, match="The loss must be a mean over the examples"):
        trained(heads(RegularizedModel), X, (Y, [Y, Y]), ("mse", ["mse", total]),
                regularizer=regularizer)  # fmt: skip


# Data


class Lists(keras.utils.PyDataset):
    """Batches whose targets are a list, as they are for several outputs."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return X[rows], [Y[rows], Y[rows] + 1]


def test_lists_in_a_py_dataset_are_what_they_are_in_keras():
    def outcome(base, **kwargs):
        inputs = keras.Input((3,))
        outputs = [layers.Dense(2, kernel_initializer="ones")(inputs) for _ in range(2)]
        model = base(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.1), ["mse", "mse"], **kwargs)
        try:
            return model.fit(Lists(), shuffle=False, verbose=0).history["loss"]
        except TypeError as error:  # Keras on TensorFlow wants tuples
            return str(error)[:50]

    regularizer = SubBatchPerturbation(beta=0.0, num_sub_batches=2)
    found, expected = outcome(RegularizedModel, regularizer=regularizer), outcome(keras.Model)
    if isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
