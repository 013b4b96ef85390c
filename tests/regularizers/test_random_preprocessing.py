"""Random preprocessing that a model begins with runs once for all passes over sub-batches."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy, only_on
from keras import layers

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import preprocessing_layers
from keras_infomcr.regularizers import SubBatchPerturbation

QUICKEST = {} if BACKEND == "jax" else {"run_eagerly": True}


def chain():
    return [layers.RandomFlip(seed=1), layers.Rescaling(0.5), layers.RandomContrast(0.5, seed=2)]


def trained(before, x, y, **kwargs):
    """Return a model whose input passes some layers first, after two steps."""
    keras.utils.set_random_seed(0)
    inputs = outputs = keras.Input((4, 4, 2))
    for layer in before:
        outputs = layer(outputs)
    outputs = layers.Dense(3, "tanh")(layers.Flatten()(outputs))
    model = RegularizedModel(inputs, layers.Dense(2)(outputs))
    regularizer = SubBatchPerturbation(0.01, 5.0, num_sub_batches=3, **kwargs)
    model.compile(keras.optimizers.SGD(1 / 8), "mse", regularizer=regularizer, **QUICKEST)
    for a, b in zip(x, y):
        model.train_on_batch(a, b)
    return model


def weights(model):
    return np.concatenate([np.ravel(numpy(v)) for v in model.trainable_variables])


@pytest.fixture
def data(rng):
    return rng.uniform(size=(2, 5, 4, 4, 2)), rng.normal(size=(2, 5, 2))


def test_all_passes_of_a_step_share_the_draw_of_its_batch(float64, data):
    """The same layers, called by hand on each whole batch, leave the same weights and seeds."""
    before = chain()
    model = trained(before, *data)
    assert model.regularizer.replaces_main_pass(model)
    by_hand, x = chain(), []
    for batch in data[0]:
        for layer in by_hand:
            batch = layer(batch, training=True)
        x.append(numpy(batch))
    expected = trained([], x, data[1])
    # Keras computes some of the images in float32, which rounds values below 1 to 6e-8 of them.
    # Weights differ by no more than the gradients do, of which there are two.
    np.testing.assert_allclose(weights(model), weights(expected), rtol=0, atol=1e-6)
    for layer, other in zip(before, by_hand):
        for seed, same in zip(layer.variables, other.variables):
            np.testing.assert_array_equal(numpy(seed), numpy(same))
        assert "call" not in vars(layer)


@only_on("tensorflow", "torch", reason="A compiled step calls no layer.")
@pytest.mark.parametrize(("main_gradient", "calls"), [("auto", 1), ("full_batch", 2)])
def test_preprocessing_runs_once_for_all_sub_batches(data, monkeypatch, main_gradient, calls):
    """A pass of Keras's own over the whole batch runs it once more."""
    found = []
    contrast = layers.RandomContrast.transform_images

    def transform_images(self, images, transformation, training=True):
        found.append(len(images))
        return contrast(self, images, transformation, training)

    model = trained(chain(), *data, main_gradient=main_gradient)  # whose layers are built
    monkeypatch.setattr(layers.RandomContrast, "transform_images", transform_images)
    model.train_on_batch(data[0][0], data[1][0])
    assert found == [5] * calls


def flipped(x):
    return layers.RandomFlip()(x)


OTHERS = {
    "weights before": lambda x: flipped(layers.Conv2D(2, 1)(x)),
    "used twice": lambda x: flipped(x) + x,
    "nothing random": lambda x: layers.Rescaling(0.5)(x),
    "operation before": lambda x: flipped(x * 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_preprocessing_stays_in_the_passes_where_more_depends_on_its_input(name):
    inputs = keras.Input((4, 4, 2))
    model = RegularizedModel(inputs, layers.Flatten()(OTHERS[name](inputs)))
    model.compile("sgd", "mse")
    assert not preprocessing_layers(model)
