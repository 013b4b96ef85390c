"""Which layers and operations are taken to map each example by itself; and that they do."""

import functools

import keras
import numpy as np
import pytest
from frameworks import BACKEND, gradients, numpy
from keras import layers, ops
from layer_cases import KNOWN, SEQUENCE, SLOW, TOKENS, UNKNOWN, VECTOR, examples, input_of
from parameters import with_slow

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

NUMBER, SLICES = 5, [slice(0, 2), slice(2, 5)]
EPSILON = {dtype: np.finfo(dtype).eps for dtype in ("float32", "float64")}


def model_of(function, shape, head=True):
    """Return a compiled model; `head` flattens the outputs, and maps them to two numbers."""
    inputs = input_of(shape)
    outputs = function(inputs)
    if head:
        outputs = layers.Dense(2)(layers.Flatten()(outputs))
    model = RegularizedModel(inputs, outputs)
    regularizer = SubBatchPerturbation(0.01, 1.0, num_sub_batches=2)
    model.compile(keras.optimizers.SGD(1 / 8), "mse", regularizer=regularizer)
    return model


def takes_sub_batches(model):
    return model.regularizer.replaces_main_pass(model)


def flat(arrays):
    return np.concatenate([np.ravel(numpy(ops.convert_to_tensor(a, sparse=False))) for a in arrays])


def gradient(model, x, weight):
    """Return the gradient of the mean square of the outputs, times a weight, and the outputs."""

    def loss():
        outputs = model(x, training=True)
        return weight * ops.mean(ops.square(outputs)), outputs

    _, outputs, found = gradients(loss, model.trainable_variables)
    return flat(g for g in found if g is not None), numpy(outputs)


def whole_and_slices(model, x):
    """Return the gradient and outputs of a batch, and what its slices make them."""
    parts = [gradient(model, x[s], len(x[s]) / len(x)) for s in SLICES]
    mean = sum(g for g, _ in parts), np.concatenate([y for _, y in parts])
    return gradient(model, x, 1.0), mean


def assert_maps_by_example(model, x):
    for whole, mean in zip(*whole_and_slices(model, x)):
        # The sums are the same in another order. There are fewer than a hundred terms in each, and
        # a few layers one after the other, in each of which nothing much larger cancels.
        np.testing.assert_allclose(
            mean, whole, rtol=0, atol=1000 * EPSILON[str(whole.dtype)] * np.abs(whole).max()
        )


def test_every_layer_of_keras_is_in_the_table():
    """Put a new layer into the table, and into the list of `coupling.py` if it is known."""
    kinds = [kind for kind in vars(layers).values() if isinstance(kind, type)]
    listed = {getattr(layers, name, None) for name in (*KNOWN, *UNKNOWN)}
    assert {kind for kind in kinds if issubclass(kind, layers.Layer)} <= listed
    assert not set(KNOWN) & UNKNOWN


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KNOWN]
)
def test_sub_batches_give_the_gradient_of_a_layer(float64, rng, name):
    if not hasattr(layers, name):
        pytest.skip(f"This version of Keras has no {name}.")
    shape, function = KNOWN[name]
    if "Pooling3D" in name:  # which TensorFlow does not compute in float64
        keras.config.set_dtype_policy("float32")
    model = model_of(function, shape)
    assert takes_sub_batches(model)
    assert_maps_by_example(model, examples(shape, NUMBER, rng))


def dense(x):
    return layers.Dense(x.shape[-1])(x)


def attention_block(x):
    """Return the outputs of a block of a transformer, which is written with operations."""
    y = layers.LayerNormalization()(x)
    heads = [ops.reshape(dense(y), (-1, 4, 2, 1)) for _ in range(3)]
    query, key, value = (ops.transpose(h, (0, 2, 1, 3)) for h in heads)
    scores = ops.softmax(ops.matmul(query, ops.swapaxes(key, 2, 3)) / 2)
    mixed = ops.transpose(ops.einsum("bhqk,bhkd->bhqd", scores, value), [0, 2, 1, 3])
    return x + ops.gelu(dense(ops.reshape(mixed, (-1, 4, 2))))


def positions(x):
    return ops.cumsum(ops.ones_like(x[..., 0]), axis=1) - 1


def partly_frozen(x):
    frozen = layers.BatchNormalization()
    frozen.trainable = False
    return frozen(dense(x)) * ops.sigmoid(x[:, -1:, None, 0])


TABLE = np.arange(8.0).reshape(4, 2)

OPERATIONS = {
    "residual": lambda x: x + 0.5 * ops.relu(dense(x)) - TABLE,
    "attention": attention_block,
    "positions": lambda x: layers.Embedding(4, 2)(positions(x)) + x,
    "gated": partly_frozen,
    "joined": lambda x: ops.concatenate([x, ops.stack([x[:, 0], x[..., 1, :]], axis=1)], axis=1),
    "pooled": lambda x: ops.mean(x, axis=1, keepdims=True) + ops.max(dense(x), axis=-2)[:, None],
    "padded": lambda x: ops.pad(x, [[0, 0], [1, 0], [0, 2]]),
    "product": lambda x: ops.matmul(TABLE.T, x) @ TABLE.T,
    "expanded": lambda x: ops.squeeze(ops.expand_dims(x, 1), 1) ** 2,
    "activation": lambda x: layers.Dense(2, ops.silu)(x),
    "layer as activation": lambda x: layers.Dense(2, layers.LeakyReLU())(x),
    "mask used": lambda x: (
        layers.LSTM(2)(layers.Masking()(x) + 1) + layers.GRU(2)(layers.Masking()(x))
    ),
    "nested": lambda x: keras.Sequential([keras.Input((4, 2)), layers.Dense(2), layers.Flatten()])(
        x
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_sub_batches_give_the_gradient_of_operations(float64, rng, name):
    model = model_of(OPERATIONS[name], SEQUENCE)
    assert takes_sub_batches(model)
    assert_maps_by_example(model, examples(SEQUENCE, NUMBER, rng))


def known_activations():
    found = {k: f for k, f in vars(keras.activations).items() if callable(f)}
    return {k: f for k, f in found.items() if k not in ("get", "serialize", "deserialize")}


@pytest.mark.parametrize("name", known_activations())
def test_activations_of_keras_map_each_example_by_itself(float64, rng, name):
    """This is the test of all of them that Keras adds, too."""
    function, x = known_activations()[name], rng.normal(size=(NUMBER, 4))
    if name == "threshold":
        function = functools.partial(function, threshold=0.5, default_value=0.0)
    parts = [numpy(function(ops.convert_to_tensor(x[s]))) for s in SLICES]
    whole = numpy(function(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=10 * EPSILON["float64"])


# They mix the examples of a batch.
MIXING = {
    "mean": lambda x: x - ops.mean(x, axis=0),
    "sum of all": lambda x: x - ops.sum(x),
    "maximum": lambda x: x / ops.max(ops.abs(x), axis=(0, 1)),
    "softmax": lambda x: ops.softmax(x, axis=-3),
    "cumsum": lambda x: ops.cumsum(x, axis=0),
    "flip": lambda x: x - ops.flip(x),
    "first": lambda x: x - x[0],
    "roll": lambda x: x - ops.roll(x, 1, axis=0),
    "stack": lambda x: ops.sum(ops.stack([x, ops.flip(x, 0)], axis=-4), axis=0),
    "einsum": lambda x: ops.einsum("bij,cij->bij", x, ops.flip(x, axis=1)),
    "einsum layer": lambda x: layers.EinsumDense("abc,cd->bd", 2)(x) + x,
    "activation": lambda x: x + layers.Dense(2, ops.flip)(x),
    "partial": lambda x: layers.Activation(functools.partial(ops.softmax, axis=0))(x),
    "in time": lambda x: layers.TimeDistributed(layers.BatchNormalization())(x),
    "of positions": lambda x: layers.Softmax(axis=-3)(x),
    "normalised": lambda x: layers.BatchNormalization()(x) + x,
}


@pytest.mark.parametrize("name", MIXING)
def test_full_batch_gives_the_gradient_where_examples_are_mixed(float64, rng, name):
    x = examples(SEQUENCE, NUMBER, rng)
    model = model_of(MIXING[name], SEQUENCE)
    assert not takes_sub_batches(model)
    whole, mean = whole_and_slices(model, x)
    assert np.abs(whole[0] - mean[0]).max() > 1e-3 * np.abs(whole[0]).max()


# No list says that they map each example by itself, or they draw random numbers.
NOT_PROVEN = {
    "reshaped": lambda x: ops.reshape(ops.reshape(x, (-1, 2)) ** 2, (-1, 4, 2)),
    "broadcast": lambda x: x - x[:, 0],
    "twice": lambda x: ops.concatenate([x, x], axis=0),
    "normalised": lambda x: layers.Dense(2, layers.BatchNormalization())(x),
    "attention": lambda x: layers.MultiHeadAttention(1, 2, attention_axes=(0, 1))(x, x),
    "user's function": lambda x: layers.Dense(2, lambda y: y)(x),
    "no list of it": lambda x: ops.trace(x, axis1=1, axis2=2)[:, None] + x[:, 0],
    "random": lambda x: layers.Dropout(0.5)(x),
    "random in a layer": lambda x: layers.MultiHeadAttention(1, 2, dropout=0.5)(x, x),
    "random in a cell": lambda x: layers.LSTM(2, recurrent_dropout=0.5)(x),
    "inside": lambda x: layers.TimeDistributed(layers.Dropout(0.5))(x),
    "a mask through a model": lambda x: keras.Sequential([keras.Input((4, 2)), layers.Dense(2)])(
        layers.Masking()(x)
    ),
    "a mask of a cast": lambda x: ops.cast(layers.Masking()(x), x.dtype),
}


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
@pytest.mark.parametrize("name", NOT_PROVEN)
def test_full_batch_gives_the_gradient_where_nothing_is_proven(name):
    assert not takes_sub_batches(model_of(NOT_PROVEN[name], SEQUENCE))


MASKED = {
    "masking": (SEQUENCE, lambda x: layers.Dense(2)(layers.Masking()(x))),
    "embedding": (TOKENS, layers.Embedding(5, 2, mask_zero=True)),
    "sequences": (SEQUENCE, lambda x: layers.LSTM(2, return_sequences=True)(layers.Masking()(x))),
    "nested": (
        SEQUENCE,
        lambda x: keras.Sequential([keras.Input((4, 2)), layers.Masking(), layers.Dense(2)])(x),
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_full_batch_gives_the_gradient_of_a_loss_under_a_mask(name):
    """Keras divides such a loss by the number of unmasked positions in all of the batch."""
    shape, function = MASKED[name]
    assert not takes_sub_batches(model_of(function, shape, head=False))


def test_full_batch_gives_the_gradient_of_a_loss_without_an_axis_for_each_example():
    """Keras takes the mean of such a loss before the examples are weighted."""
    assert not takes_sub_batches(
        model_of(lambda x: layers.Reshape(())(layers.Dense(1)(x)), VECTOR, head=False)
    )


OPTIMIZERS = {
    "sgd": (lambda: keras.optimizers.SGD(1 / 8, momentum=1 / 2, nesterov=True), True),
    "adam": (lambda: keras.optimizers.Adam(1 / 8), False),
    "clipped": (lambda: keras.optimizers.SGD(1 / 8, clipnorm=1 / 64), False),
}


@pytest.mark.parametrize("name", with_slow(OPTIMIZERS, "clipped"))
def test_steps_of_an_embedding_are_those_of_the_full_batch(float64, rng, name):
    """To optimizers other than SGD the rows of a sparse gradient are not what their sum is."""
    optimizer, sums = OPTIMIZERS[name]
    tokens, y = np.array([[0, 1], [1, 1], [2, 0], [1, 0]]), rng.normal(size=(4, 2, 2))
    found = {}
    for main_gradient in ("auto", "full_batch", "sub_batches"):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((2,), dtype="int32")
        model = RegularizedModel(inputs, layers.Embedding(3, 2)(inputs))
        regularizer = SubBatchPerturbation(0.01, 1.0, 2, main_gradient)
        mode = {} if BACKEND == "jax" else {"run_eagerly": True}
        model.compile(optimizer(), "mse", regularizer=regularizer, **mode)
        for _ in range(2):
            model.train_on_batch(tokens, y)
        found[main_gradient] = flat(model.get_weights())
        if main_gradient == "auto":
            assert takes_sub_batches(model) == (sums or BACKEND != "tensorflow")
    # Sums of a few terms of order one in another order; Adam divides by roots of such sums.
    np.testing.assert_allclose(found["auto"], found["full_batch"], rtol=0, atol=1e-13)
    if BACKEND == "tensorflow" and not sums:
        assert np.abs(found["sub_batches"] - found["full_batch"]).max() > 1e-4
