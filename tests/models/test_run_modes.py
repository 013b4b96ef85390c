"""Graphs, XLA, eager steps and kinds of data train as in Keras and as in Algorithm 1."""

import keras
import pytest
from frameworks import only_on
from literal_reading import check_training, flat
from small_nets import EAGER, LABELS, WEIGHTS, XLA, X, Y, classifier, compiling, fitting, two_layers

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.slow
@only_on("tensorflow", "jax", reason="Keras refuses `steps_per_execution` on torch.")
def test_steps_per_execution():
    check_training(two_layers, fitting(), compiling(steps_per_execution=2), "auto")


@pytest.mark.slow
def test_jit_compile():
    # XLA fuses the two programs differently.
    check_training(two_layers, fitting(), compiling(**XLA), "auto", 1e-13)


def test_run_eagerly():
    check_training(two_layers, fitting(), compiling(**EAGER), "auto")


@pytest.mark.parametrize(
    ("main", "eagerly"), [pytest.param("full_batch", False, marks=pytest.mark.slow), ("auto", True)]
)
def test_train_on_batch(main, eagerly):
    def fit(model):
        batches = [slice(0, 5), slice(5, 6)]
        returned = [model.train_on_batch(X[s], LABELS[s], WEIGHTS[s]) for s in batches]
        assert all(isinstance(r, list) and len(r) == 2 for r in returned)
        named = model.train_on_batch(X, LABELS, class_weight={0: 1, 1: 2, 2: 3}, return_dict=True)
        return {**named, "batches": flat(returned)}

    compile = compiling(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    check_training(classifier, fit, lambda: {**compile(), "run_eagerly": eagerly}, main)


def test_batches_of_known_size():
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    dataset = tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(5, drop_remainder=True)
    check_training(two_layers, fitting(dataset, None, batch_size=None), compiling(), "auto")


def test_python_data_set():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return X[5 * i : 5 * i + 5], Y[5 * i : 5 * i + 5]

    check_training(
        two_layers,
        lambda m: fitting(Batches(), None, batch_size=None)(m),
        compiling(**EAGER),
        "auto",
    )
