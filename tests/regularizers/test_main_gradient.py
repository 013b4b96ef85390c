"""Whether the sub-batches give the main gradient, or the whole batch does."""

import keras
import numpy as np
import pytest
from algorithm_1 import ALPHA, RATE, SoftmaxRegression, flat, make
from frameworks import BACKEND
from gelu_networks import GeluNetwork
from parameters import with_slow

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

# Without a compiler JAX takes longer.
QUICKEST = {} if BACKEND == "jax" else {"run_eagerly": True}


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
    return model.regularizer.replaces_main_pass(model)


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
    """With beta = 0 the step is plain Keras's, however the labels fall into sub-batches."""
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
    # One step of two compiled programs, which may round differently in float64.
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-14)


def zero_beta():
    return SubBatchPerturbation(beta=0.0, num_sub_batches=2)


ONE_SLICE = {
    "batch norm": (lambda x: of_layer(keras.layers.BatchNormalization())(x), "mse", True),
    "centred": (lambda x: dense(x) - keras.ops.mean(dense(x), axis=0), "mse", False),
    "dropout": (lambda x: of_layer(keras.layers.Dropout(0.5))(x), "mse", False),
    "loss of the batch": (dense, centred_loss, True),
    "own class": (dense, Centred(), False),
    "sum": (dense, keras.losses.MeanSquaredError(reduction="sum"), False),
}


@pytest.mark.parametrize("name", with_slow(ONE_SLICE, "loss of the batch"))
def test_one_slice_is_the_whole_batch(float64, rng, name):
    """One sub-batch gives the main gradient, and the moving statistics, of layers of Keras."""
    outputs, loss, known = ONE_SLICE[name]
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 3))
    found = []
    for main_gradient in ("auto", "full_batch"):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        model = RegularizedModel(inputs, outputs(inputs))
        rule = SubBatchPerturbation(ALPHA, 1.0, num_sub_batches=1, main_gradient=main_gradient)
        model.compile(keras.optimizers.SGD(RATE), loss, regularizer=rule, **QUICKEST)
        assert rule.replaces_main_pass(model) == (known and main_gradient == "auto")
        if known:
            logs = model.fit(x, y, epochs=2, batch_size=5, verbose=0, shuffle=False).history
            found.append([*logs["loss"], *logs["infomcr_reg"], *flat(model.get_weights())])
    # The same is computed: only programs may round differently, in four steps.
    if known:
        np.testing.assert_allclose(*found, rtol=1e-12, atol=1e-14)


def test_full_batch_gives_the_main_gradient_of_an_overridden_call():
    assert not main_gradient_of(dense, base=Overridden)


def test_full_batch_gives_the_main_gradient_of_a_subclass():
    assert not make_subclassed().regularizer.replaces_main_pass(make_subclassed())


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


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_sub_batches_of_a_loss_that_is_no_mean_are_refused(reduction, rng):
    model = make(SoftmaxRegression, main_gradient="sub_batches")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile("sgd", loss, regularizer=model.regularizer)
    before = model.get_weights()
    with pytest.raises(ValueError, match='Use `main_gradient="full_batch"`'):
        model.fit(rng.normal(size=(8, 5)), rng.integers(3, size=8), verbose=0)
    np.testing.assert_array_equal(flat(model.get_weights()), flat(before))
