"""Batch normalisation gets the moments of data, whoever trained the model."""

import keras
import numpy as np
import pytest
from frameworks import numpy, tensorflow
from keras import layers

from keras_infomcr.flatness import reestimate_batch_norm

X = np.random.default_rng(0).normal(size=(150, 3)).astype("float32") * [1, 2, 3] + [0, 5, -5]
X = X.astype("float32")


def net(*stack):
    return keras.Sequential([keras.Input((3,)), *stack])


def norm_after_dense():
    return net(layers.Dense(4), layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(2))


def moments(model, x=X):
    """Return the float64 moments of the first layer's outputs over all data."""
    kernel, bias = (numpy(v).astype("float64") for v in model.layers[0].variables)
    hidden = x.astype("float64") @ kernel + bias
    return hidden.mean(axis=0), hidden.var(axis=0)


def assert_has_moments(norm, expected, rtol=1e-5):
    # Some 4 products and a sum of 150 terms in float32, each rounded by 6e-8 of values up to ten
    # times the result.
    np.testing.assert_allclose(numpy(norm.moving_mean), expected[0], rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(numpy(norm.moving_variance), expected[1], rtol=rtol)


@pytest.mark.parametrize("batch_size", [128, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_moments_are_those_of_all_data_together(compiled, batch_size):
    model = norm_after_dense()
    if compiled:
        model.compile("sgd", "mse")
    others = [numpy(v).copy() for v in model.variables if "moving" not in v.path]
    reestimate_batch_norm(model, X, batch_size=batch_size)
    assert_has_moments(model.layers[2], moments(model))
    after = [numpy(v) for v in model.variables if "moving" not in v.path]
    for before, now in zip(others, after):
        np.testing.assert_array_equal(now, before)


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[50 * i : 50 * i + 50], np.zeros(50)


FORMS = {
    "(x,)": lambda: (X,),
    "(x, y)": lambda: (X, np.zeros((150, 2))),
    "list of batches of x": lambda: [X[:100], X[100:]],
    "list of batches (x, y)": lambda: [(X[:100], np.zeros(100)), (X[100:], np.zeros(50))],
    "PyDataset": lambda: Sequence(workers=1),
    "tf.data of x": lambda: tensorflow().data.Dataset.from_tensor_slices(X).batch(40),
    "tf.data of (x, y)": lambda: (
        tensorflow().data.Dataset.from_tensor_slices((X, np.zeros(150))).batch(40)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form):
    model = norm_after_dense()
    reestimate_batch_norm(model, FORMS[form]())
    assert_has_moments(model.layers[2], moments(model))


def test_several_inputs():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    norm = layers.BatchNormalization()
    model = keras.Model(inputs, norm(layers.concatenate(inputs)))
    reestimate_batch_norm(model, ([X, 2 * X],))
    both = np.concatenate([X, 2 * X], axis=1).astype("float64")
    assert_has_moments(norm, (both.mean(axis=0), both.var(axis=0)))


def test_variance_between_batches_keeps_its_digits_beside_a_large_mean():
    """A difference of squares of means of 1e4 would have lost a variance of 0.3 in float32.

    The variance within a batch, 0 here, is the framework's; torch's is such a difference.
    """
    x = (1e4 + np.repeat(np.arange(15), 10)[:, None] * 0.125 * np.ones(3)).astype("float32")
    model = net(layers.BatchNormalization())
    reestimate_batch_norm(model, x, batch_size=10)
    found = numpy(model.layers[0].moving_variance)
    # Means of equal numbers of 1e4 are rounded by 5e-4 beside the spread of 0.5.
    np.testing.assert_allclose(found, x.astype("float64").var(axis=0), rtol=2e-3)


def test_layers_above_see_the_normalised_batch():
    model = net(layers.BatchNormalization(), layers.BatchNormalization(epsilon=0.0))
    reestimate_batch_norm(model, X, batch_size=150)
    # The first gives mean 0 and variance v / (v + epsilon).
    v = X.astype("float64").var(axis=0)
    np.testing.assert_allclose(numpy(model.layers[1].moving_mean), 0, atol=1e-5)
    np.testing.assert_allclose(numpy(model.layers[1].moving_variance), v / (v + 1e-3), rtol=1e-5)


def test_what_is_left_as_it_is():
    frozen = norm_after_dense()
    frozen.layers[2].trainable = False
    plain = net(layers.Dense(2))
    for model in (frozen, plain):
        before = [numpy(v).copy() for v in model.variables]
        reestimate_batch_norm(model, X)
        for value, variable in zip(before, model.variables):
            np.testing.assert_array_equal(numpy(variable), value)


def test_replicas_share_the_data(mirrored):
    with mirrored.scope():
        model = norm_after_dense()
    reestimate_batch_norm(model, X, batch_size=40)
    kernel, bias = (numpy(keras.ops.copy(v)) for v in model.layers[0].variables)
    hidden = X.astype("float64") @ kernel + bias
    for variable, expected in (
        (model.layers[2].moving_mean, hidden.mean(axis=0)),
        (model.layers[2].moving_variance, hidden.var(axis=0)),
    ):
        for copy in mirrored.experimental_local_results(variable.value):
            np.testing.assert_allclose(copy.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "data", "kwargs", "error", "message"),
    [
        (3, X, {}, TypeError, "`model` must be a `keras.Model`. Received: model=3"),
        (keras.Sequential(), X, {}, ValueError, "The model must be built. Received: model="),
        (None, X[:0], {}, ValueError, "The data must not be empty. Received: no example"),
        (None, [], {}, ValueError, "The data must not be empty. Received: no batch"),
        (None, (), {}, ValueError, "The data must not be empty"),
        (None, 5, {}, TypeError, "`x` must be an array, a structure of arrays, or an iterable"),
        (None, iter([X]), {}, ValueError, "an iterator or endless data"),
        (None, np.full((4, 3), np.nan), {}, ValueError, "`x` must be finite. Received: NaN"),
        (None, X, {"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1"),
    ],
)
def test_what_is_refused(model, data, kwargs, error, message):
    with pytest.raises(error, match=message):
        reestimate_batch_norm(norm_after_dense() if model is None else model, data, **kwargs)
