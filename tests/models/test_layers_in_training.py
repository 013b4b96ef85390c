"""Layers, inputs and nested models of each kind train as in Keras and as in Algorithm 1."""

import contextlib

import keras
import numpy as np
import pytest
from frameworks import BACKEND, only_on
from literal_reading import check_training
from parameters import with_slow
from small_nets import (
    EAGER,
    SIZE,
    X,
    Y,
    compiling,
    fitting,
    normalized,
    sgd,
    two_layers,
    with_main_gradient,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


def test_frozen_layers():
    def build(base):
        model = two_layers(base, kernel_regularizer=keras.regularizers.L2(1 / 32))
        model.layers[1].trainable = False
        return model

    check_training(build, fitting(), compiling(**EAGER), "auto")


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
        check_training(build, fitting(), compiling(**EAGER), literal=False)


@pytest.mark.slow
@with_main_gradient
def test_layers_that_the_loss_does_not_reach(main, mode):
    def build(base):
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(3, "tanh")(inputs)
        return base(inputs, [keras.layers.Dense(2)(hidden), keras.layers.Dense(1)(hidden)])

    warned = pytest.warns(UserWarning, match="Gradients do not exist for variables")
    with contextlib.nullcontext() if BACKEND == "jax" else warned:  # where they are zero
        check_training(build, fitting(y=[Y, Y[:, :1]]), compiling(**mode, loss=["mse", None]), main)


def test_masks(rng):
    def build(base):
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
        return base(inputs, keras.layers.LSTM(2, return_sequences=True)(x))

    lengths = rng.integers(1, 4, size=SIZE)
    words = rng.integers(1, 5, size=(SIZE, 3)) * (np.arange(3) < lengths[:, None])
    weights = rng.uniform(0.2, 3, size=(SIZE, 3))
    fit = fitting(words, rng.normal(size=(SIZE, 3, 2)), sample_weight=weights)
    check_training(build, fit, compiling(**EAGER, metrics=["mae"], weighted_metrics=["mse"]))


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

    check_training(build, fitting(), compiling())


def test_call_without_training_argument(rng):
    def build(base):
        class Net(base):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(3, "tanh")
                self.dropout = keras.layers.Dropout(0.25)

            def call(self, x):
                return self.dropout(self.hidden(x))

        return Net()

    check_training(build, fitting(y=rng.normal(size=(SIZE, 3))), compiling(**EAGER))


def test_nested_and_dict_inputs():
    def build(base):
        first, second, third = (keras.Input((n,), name=f"input_{n}") for n in (1, 2, 3))
        inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh")])
        parts = [keras.layers.Dense(3)(first), inner(second), keras.layers.Dense(3)(third)]
        outputs = keras.layers.Dense(2)(keras.layers.Add()(parts))
        return base({"input_1": first, "more": [second, third]}, outputs)

    x = {"input_1": X[:, :1], "more": [X[:, :2], X[:, 1:]]}
    check_training(build, fitting(x), compiling(**EAGER), "auto")


@pytest.mark.slow
def test_nested_models():
    def build(base):
        inner = normalized(keras.Model)
        inputs = keras.Input((4,))
        return base(inputs, keras.layers.Dense(2)(inner(inputs)))

    check_training(build, fitting(), compiling(**EAGER))


@pytest.mark.slow
def test_regularized_models_nested_as_layers():
    def build(base):
        inner = two_layers(base, kernel_regularizer=keras.regularizers.L2(1 / 32))
        inputs = keras.Input((4,))
        return base(inputs, keras.layers.Dense(2)(inner(inputs)))

    check_training(build, fitting(), compiling(**EAGER))


@only_on("tensorflow", "jax", reason="Keras has no sparse tensors on torch.")
def test_sparse_inputs():
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

    def build(base):
        inputs = keras.Input((4,), sparse=True)
        hidden = keras.layers.Dense(3, "tanh")(inputs)
        return base(inputs, keras.layers.Dense(2)(hidden))

    x = tf.sparse.from_dense(X * (X > 0))
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(5)
    check_training(build, fitting(dataset, None, batch_size=None), compiling(), "auto")


class MeanOverWords(keras.layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.reduce_mean(x, axis=1)

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], x.shape[2]), dtype=x.dtype)


@pytest.mark.slow
@only_on("tensorflow", reason="Keras has ragged tensors on TensorFlow alone.")
def test_ragged_inputs(rng):
    import tensorflow as tf

    def build(base):
        inputs = keras.Input((None,), dtype="int32", ragged=True)
        x = MeanOverWords()(keras.layers.Embedding(5, 3)(inputs))
        return base(inputs, keras.layers.Dense(2)(x))

    lengths = 1 + np.arange(SIZE) % 4
    words = tf.RaggedTensor.from_row_lengths(rng.integers(5, size=lengths.sum()), lengths)
    dataset = tf.data.Dataset.from_tensor_slices((words, Y)).batch(5)
    check_training(build, fitting(dataset, None, batch_size=None), compiling())


def embedding(base):
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(6, 3)(inputs))
    return base(inputs, keras.layers.Dense(2)(x))


WORDS = np.random.default_rng(1).integers(6, size=(SIZE, 4))


@pytest.mark.parametrize(
    "optimizer",
    with_slow([keras.optimizers.Adam, sgd, keras.optimizers.RMSprop], keras.optimizers.RMSprop),
)
def test_embedding_with_zero_beta_equals_plain_keras(optimizer):
    # Keras's optimizers depend on how often a row occurs in a sparse gradient, which must stay.
    check_training(
        embedding, fitting(WORDS), compiling(**EAGER, optimizer=optimizer), literal=False
    )


def test_embedding():
    check_training(embedding, fitting(WORDS), compiling(**EAGER))


@only_on("tensorflow", reason="Gradients are sparse on TensorFlow alone.")
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
