"""What is tapped beside layers that are used in ways of their own."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from nets import NUM_CLASSES, compiled
from tapped import Tokens, estimator_of, expected_by_layer

from keras_infomcr.flatness.per_example import lookups
from keras_infomcr.flatness.per_example.lookups import Lookups


@pytest.fixture
def data(rng):
    return rng.normal(size=(4, 60)), rng.integers(0, NUM_CLASSES, 4)


def without_taps(model, data):
    """Return the paths of the weights without a tap, after a measurement that must be right."""
    model(data[0][:2])
    estimator = estimator_of(compiled(model), data)
    found = estimator.measure_layers()[0]
    np.testing.assert_allclose(found, expected_by_layer(model, *data), rtol=1e-9)
    taps = estimator._grams._ways.taps
    tapped = [v.path for layer in taps.layers for v in taps.weights(layer)]
    paths = {v.path for v in model.trainable_variables} - {*tapped}
    return {"/".join(path.split("/")[-2:]) for path in paths}


class Scale(layers.Layer):
    """An unknown layer."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="normal", name="scale")

    def call(self, inputs):
        return inputs * self.scale


class Odd(keras.Model):
    """Layers that are not tapped, or not with all their weights, among layers that are."""

    def __init__(self):
        super().__init__()
        self.tokens, self.table = Tokens(), layers.Embedding(7, 5, name="table")
        self.scale, self.norm = Scale(name="own"), layers.LayerNormalization(name="norm")
        self.across, self.shared = layers.Dense(3, name="across"), layers.Dense(5, name="shared")
        self.last, self.head = layers.Dense(5, name="last"), layers.Dense(NUM_CLASSES, name="head")

    def call(self, inputs):
        words = self.norm(self.scale(self.table(self.tokens(inputs))))
        words = words + self.shared(ops.tanh(self.shared(words)))
        across = self.across(ops.transpose(words, (1, 0, 2)))  # the first axis is the positions'
        tied = self.last(words) @ ops.transpose(self.table.embeddings)
        return self.head(ops.concatenate([ops.mean(across, 0), ops.mean(tied, 1)], axis=-1))


def test_odd_layers_alone_are_not_tapped(float64, data):
    odd = {"own/scale", "across/kernel", "across/bias", "table/embeddings"}
    assert without_taps(Odd(), data) == odd


class Positions(keras.Model):
    """Tables of positions, looked up once for all examples."""

    def __init__(self, mixes=None):
        super().__init__()
        self.mixes = mixes
        self.flat, self.led = layers.Embedding(12, 5, name="flat"), layers.Embedding(12, 5)
        self.inner = layers.Dense(5, "tanh", name="inner")
        self.head = layers.Dense(NUM_CLASSES, name="head")

    def call(self, inputs):
        words = ops.reshape(inputs, (-1, 12, 5))
        led = self.led(ops.arange(12)[None])
        if self.mixes == "mean":
            led = ops.mean(led, axis=0)
        if self.mixes == "first":
            led = led[0]
        if self.mixes == "shape":
            led = ops.reshape(led, (12, 5))
        words = self.inner(words + self.flat(ops.arange(12))) * led
        return self.head(ops.tanh(ops.reshape(words, (-1, 60))))


def test_tables_of_positions_are_tapped(float64, data):
    assert without_taps(Positions(), data) == set()


@pytest.mark.parametrize(
    "mixes",
    ["first", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mean", "shape"))],
)
def test_shared_outputs_that_are_not_kept_apart_are_not_tapped(float64, data, mixes):
    model = Positions(mixes)
    assert without_taps(model, data) == {"flat/embeddings", f"{model.led.name}/embeddings"}


class Repeated(keras.Model):
    """Layers in a loop whose turns are not all seen when it is traced, and after it."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(6, "tanh", name="first")
        self.head = layers.Dense(NUM_CLASSES, name="head")
        self.first.build((None, 6))

    def call(self, inputs):
        hidden = ops.fori_loop(0, 3, lambda i, h: self.first(h), inputs[:, :6])
        return self.head(hidden)


def test_a_layer_in_a_loop_leaves_the_others_their_taps(float64, data):
    found = without_taps(Repeated(), data)
    assert found <= {"first/kernel", "first/bias"}  # torch calls it three times, as in Python


@pytest.mark.parametrize("limit", [None, 1])
def test_lookups_against_a_table_for_each_example(float64, rng, monkeypatch, limit):
    """Rows that one example looks up, that many do, and that nobody does; `limit` bytes at once."""
    if limit:
        monkeypatch.setattr(lookups, "_BYTES", limit)
    rows = np.minimum(rng.geometric(0.1, (9, 20)) - 1, 49).astype("int32")
    upstream = rng.normal(size=(9, 20, 3))
    table = np.zeros((9, 50, 3))
    for i, row in np.ndindex(9, 20):
        table[i, rows[i, row]] += upstream[i, row]
    found = Lookups(ops.convert_to_tensor(rows), ops.convert_to_tensor(upstream)).gram()
    table = table.reshape(9, -1)
    np.testing.assert_allclose(ops.convert_to_numpy(found), table @ table.T, rtol=1e-9, atol=1e-9)
