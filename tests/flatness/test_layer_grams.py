"""The Gram matrices of tapped layers against Jacobians, and what is not tapped."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, jacobian, numpy, only_on
from keras import layers, ops
from measuring import measure
from nets import NUM_CLASSES, compiled
from oracles import ln_xi
from parameters import with_slow
from tapped import Tokens, estimator_of, expected_by_layer, log_odds, made

from keras_infomcr import backend
from keras_infomcr.flatness import gamma_hat_by_layer
from keras_infomcr.flatness.per_example import gradient_parts


@pytest.fixture
def data(rng):
    return rng.normal(size=(4, 60)), rng.integers(0, NUM_CLASSES, 4)


@pytest.fixture
def no_rows(monkeypatch):
    """Let a measurement fail that forms the gradients of single examples."""

    def jacobian(*args, **kwargs):
        raise AssertionError("rows are formed")

    monkeypatch.setattr(backend, "gradients_by_example", jacobian)


@pytest.fixture
def adapters_in_float64(monkeypatch):
    """Let factors of low rank have the dtype of their layer, which otherwise are float32."""
    add_weight = keras.Layer.add_weight

    def add(layer, *args, dtype=None, **kwargs):
        return add_weight(layer, *args, **kwargs)

    monkeypatch.setattr(keras.Layer, "add_weight", add)


def dense():
    """Return layers of many positions, of few (whose gradients are not formed), and of one."""
    return [
        layers.Reshape((20, 3)),
        layers.Dense(4, use_bias=False),
        layers.Reshape((2, 5, 8)),
        layers.Dense(4, "gelu"),
        layers.Reshape((2, 20)),
        layers.Dense(9, "tanh"),
        layers.Flatten(),
        layers.Dense(8, "tanh"),
    ]


def convolutions_1d():
    return [
        layers.Reshape((20, 3)),
        layers.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="tanh"),
        layers.Conv1D(5, 4, 3, padding="same"),
        layers.Conv1D(5, 2),
    ]


def convolutions_2d():
    """Return kernels of all kinds, the last of which sees few positions."""
    return [
        layers.Reshape((5, 4, 3)),
        layers.Conv2D(5, 3, padding="same", dilation_rate=(2, 1), use_bias=False),
        layers.Conv2D(6, (2, 4), padding="same", activation="tanh"),
        layers.Conv2D(6, 3, (1, 2), padding="same"),
        layers.Conv2D(14, (3, 2), (2, 1)),
        layers.Conv2D(20, 2, padding="same"),
    ]


def convolutions_3d():
    return [layers.Reshape((3, 2, 5, 2)), layers.Conv3D(3, 2, padding="same")]


def batch_normalizations():
    return [
        layers.Reshape((5, 12)),
        layers.BatchNormalization(),
        layers.BatchNormalization(axis=1),
        layers.BatchNormalization(scale=False),
        layers.BatchNormalization(center=False),
    ]


def normalizations():
    return [
        layers.Reshape((5, 12)),
        layers.LayerNormalization(),
        layers.LayerNormalization(axis=[2, 1], center=False),
        # Keras fails on torch where the last axis is not among those normalised.
        layers.LayerNormalization(axis=2 if BACKEND == "torch" else 1, scale=False),
        layers.RMSNormalization(),
        layers.RMSNormalization(axis=(1, 2)),
        layers.GroupNormalization(3, epsilon=0.1),
        layers.GroupNormalization(5, axis=1, center=False),
        layers.GroupNormalization(-1, scale=False),
    ]


def einsums():
    """Return equations with an ellipsis on either side, groups and lost axes."""
    return [
        layers.Reshape((15, 4)),
        layers.EinsumDense("...x,xy->...y", 4, "tanh", bias_axes="y"),
        layers.Reshape((5, 3, 4)),
        layers.EinsumDense("abc...,bd->adc...", (6, 3), bias_axes="dc"),
        layers.EinsumDense("abcd,cde->abce", (6, 3, 5), bias_axes="ce"),
        layers.EinsumDense("abcd,cde->aeb", (4, 6), "tanh"),
        layers.EinsumDense("abc,bde->ade", (2, 5), bias_axes="d"),
        layers.Flatten(),
        layers.EinsumDense("ab...,bc->ac...", (7,), "tanh"),
        layers.EinsumDense("ab,bcd->adc", (3, 4)),
    ]


def adapters():
    """Return layers with factors of low rank beside a frozen kernel."""
    return [
        layers.Reshape((60, 1)),
        layers.EinsumDense("abc,cde->abde", (60, 2, 4), lora_rank=3, bias_axes="e"),
        layers.EinsumDense("abde,dec->abc", (60, 5), "tanh", lora_rank=2),
        layers.Dense(6, "tanh", lora_rank=2, lora_alpha=5),
    ]


def adapter_of_a_table():
    return [Tokens(), layers.Embedding(9, 5, lora_rank=2, lora_alpha=3)]


def embeddings():
    """Return a table of few rows, of which each is looked up often, and one of many."""
    return [Tokens(40), Tables(layers.Embedding(7, 5), layers.Embedding(40, 4, mask_zero=True))]


def attention():
    # With dropout, which does nothing here, JAX computes the softmax in float64 as well.
    return [layers.Reshape((6, 10)), SelfAttention(layers.MultiHeadAttention(2, 3, 4, dropout=0.1))]


def attention_of_groups():
    grouped = layers.GroupQueryAttention(4, 4, 2, dropout=0.1)
    return [layers.Reshape((6, 10)), SelfAttention(grouped)]


def several_calls():
    """Return layers that are called several times: for each step in time, or by a loop."""
    norm = layers.LayerNormalization()
    shared = [norm, layers.EinsumDense("ab,bc->ac", 10, bias_axes="c"), layers.Activation("tanh")]
    time = [layers.TimeDistributed(x) for x in (Named(10), norm, layers.Dense(3))]
    return [layers.Reshape((3, 20)), *time, layers.Flatten(), layers.Dense(10), *shared, *shared]


class Tables(layers.Layer):
    """Looks up the same integers in two tables, counted from the end in the second."""

    def __init__(self, few, many):
        super().__init__()
        self.few, self.many = few, many

    def call(self, inputs):
        return ops.concatenate([self.few(inputs % 7), self.many(inputs - 40)], axis=-1)


class SelfAttention(layers.Layer):
    """Attends to its inputs and adds them."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, inputs):
        return inputs + self.attention(inputs, inputs)


class Named(layers.Dense):
    """A known layer with other defaults and nothing else of its own."""

    def __init__(self, units):
        super().__init__(units, "tanh", bias_initializer="normal")

    def get_config(self):
        return {"units": self.units}


@pytest.mark.parametrize(
    "stack",
    [
        dense,
        pytest.param(convolutions_1d, marks=pytest.mark.slow),
        convolutions_2d,
        pytest.param(convolutions_3d, marks=pytest.mark.slow),
        batch_normalizations,
        normalizations,
        einsums,
        adapters,
        pytest.param(adapter_of_a_table, marks=pytest.mark.slow),
        embeddings,
        attention,
        pytest.param(attention_of_groups, marks=pytest.mark.slow),
        several_calls,
    ],
)
def test_layers_against_jacobians(float64, adapters_in_float64, data, no_rows, stack):
    model = made(stack())
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


@only_on("jax", "torch", reason="TensorFlow has no convolutions of channels first on CPUs")
def test_channels_first(float64, data, no_rows):
    conv = layers.Conv2D(6, 3, 2, padding="same", data_format="channels_first")
    model = made([layers.Reshape((3, 5, 4)), conv])
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


@pytest.mark.slow
def test_kernels_in_parts(float64, data, no_rows, monkeypatch):
    monkeypatch.setattr(gradient_parts, "_ROW_BYTES", 1)  # an input feature at a time
    model = made(convolutions_2d())
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


@pytest.mark.parametrize("frozen", ["kernel", "bias"])
def test_a_frozen_weight_of_a_layer_does_not_count(float64, data, no_rows, frozen):
    model = made([layers.Reshape((5, 4, 3)), layers.Conv2D(6, (3, 2), (2, 1))])
    getattr(model.layers[1], frozen).trainable = False
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


def test_follows_weights_and_statistics(float64, data, no_rows):
    """A second model's numbers in the same compiled pass."""
    model = made(batch_normalizations())
    estimator = estimator_of(model, data)
    before = estimator.measure_layers()[0]
    for v in model.variables:
        v.assign(v * 1.5)
    after = estimator.measure_layers()[0]
    assert np.all(before != after)
    np.testing.assert_allclose(after, expected_by_layer(model, *data), rtol=1e-9)


# ---------------------------------------------------------------- what is not tapped


class Tied(keras.Model):
    """A kernel that is read outside its layer as well."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8, "tanh"), layers.Dense(NUM_CLASSES)

    def call(self, inputs):
        hidden = self.first(inputs)
        return self.last(self.first.bias + hidden @ ops.transpose(self.first.kernel)[:, :8])


class OwnStatistics(keras.Model):
    """Batch normalisation in training mode at all times: examples see each other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8, "tanh"), layers.Dense(NUM_CLASSES)
        self.norm = layers.BatchNormalization()

    def call(self, inputs):
        inputs = ops.reshape(inputs, (-1, 12, 5))
        hidden = self.norm(self.first(inputs), training=True)
        return self.last(ops.mean(ops.tanh(hidden), axis=1))


class Gated(keras.Model):
    """Batch normalisation in training mode on a branch that does not yet reach the outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8), layers.Dense(NUM_CLASSES)
        self.norm = layers.BatchNormalization()
        self.gate = layers.Dense(8, kernel_initializer="zeros")

    def call(self, inputs):
        hidden = self.first(inputs)
        return self.last(ops.tanh(hidden) + self.gate(ops.tanh(self.norm(hidden, training=True))))


class InPlace(keras.Model):
    """Adds to what a layer returned; on torch in place."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8), layers.Dense(NUM_CLASSES)

    def call(self, inputs):
        hidden = self.first(inputs)
        hidden += 0.1 * inputs[:, :8]
        return self.last(ops.tanh(hidden))


class Twins(keras.Model):
    """Two layers with one kernel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(8, "tanh"), layers.Dense(8)
        self.last = layers.Dense(NUM_CLASSES)
        self.first.build((None, 20))
        self.second._kernel, self.second.bias = self.first._kernel, self.first.bias
        self.second.built = True

    def call(self, inputs):
        return self.last(self.first(inputs[:, :20]) * self.second(inputs[:, 20:40]))


class Transposed(keras.Model):
    """A layer whose first axis is not that of the examples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8, "tanh"), layers.Dense(NUM_CLASSES)

    def call(self, inputs):
        steps = ops.transpose(ops.reshape(inputs, (-1, 4, 15)), (1, 0, 2))
        return self.last(ops.mean(self.first(steps), axis=0))


class Looped(keras.Model):
    """A layer within a loop of the framework."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(6, "tanh"), layers.Dense(NUM_CLASSES)
        self.first.build((None, 6))

    def call(self, inputs):
        _, hidden = ops.while_loop(
            lambda i, h: i < 2, lambda i, h: (i + 1, self.first(h)), (0, inputs[:, :6])
        )
        return self.last(hidden)


class Scanned(keras.Model):
    """A layer within a loop that some frameworks trace once for all its turns."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(6, "tanh"), layers.Dense(NUM_CLASSES)
        self.first.build((None, 6))

    def call(self, inputs):
        steps = ops.transpose(ops.reshape(inputs, (-1, 10, 6)), (1, 0, 2))
        hidden, _ = ops.scan(lambda h, x: (self.first(h + x), 0 * x), inputs[:, :6], steps)
        return self.last(hidden)


@pytest.mark.parametrize(
    "make",
    with_slow([Tied, OwnStatistics, InPlace, Twins, Transposed, Looped, Scanned], Looped, Scanned),
)
def test_other_uses_of_layers_against_jacobians(float64, data, make):
    model = make()
    model(data[0][:2])
    compiled(model)
    if make is Looped and BACKEND == "jax":
        pytest.skip("JAX has no derivative of a loop of unknown length")
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


def test_examples_coupled_where_the_outputs_do_not_see_it_yet(float64, data):
    """The value of a model that is measured again after the branch has opened."""
    model = Gated()
    model(data[0][:2])
    compiled(model)
    estimator = estimator_of(model, data)
    estimator.prepare()
    model.gate.kernel.assign(np.random.default_rng(0).normal(size=(8, 8)))
    (result,) = estimator.measure()
    every = ln_xi(jacobian(lambda: log_odds(model, *data), model.trainable_variables))
    assert result[1] == pytest.approx(every, rel=1e-9)


def test_recurrent_layers_with_a_sigmoid(float64, data):
    model = made([layers.Reshape((12, 5)), layers.LSTM(6, activation="sigmoid")])
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


class Doubled(layers.Dense):
    """A layer with a computation of its own under a known one's name."""

    def call(self, inputs):
        return super().call(2 * inputs)


def test_subclasses_of_known_layers(float64, data):
    model = made([Doubled(8)])
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)


def test_known_and_other_layers_together(float64, data):
    model = made([layers.Reshape((12, 5)), layers.LayerNormalization(), layers.Dense(3)])
    result = gamma_hat_by_layer(model, *data, num_examples=4, num_trials=1)
    np.testing.assert_allclose(result.values, expected_by_layer(model, *data), rtol=1e-9)
    value = measure(model, *data).value
    every = ln_xi(jacobian(lambda: log_odds(model, *data), model.trainable_variables))
    m = numpy(log_odds(model, *data))
    assert value == pytest.approx(every - 2 * np.sum(np.logaddexp(0, m)), rel=1e-9)
