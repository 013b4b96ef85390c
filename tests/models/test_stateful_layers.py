"""Stateful recurrent layers: each batch begins with the states that the last one left."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, numpy, only_on
from literal_reading import check_training, flat
from small_nets import compiling, fitting

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


def sequences(size):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(size, 3, 2)), generator.normal(size=(size, 2))
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True)


not_stateful_on_torch = only_on(
    "tensorflow", "jax", reason="Keras cannot train stateful recurrent layers on torch."
)


def stateful(base):
    inputs = keras.Input(batch_shape=(4, 3, 2))
    return base(inputs, keras.layers.LSTM(2, stateful=True, unroll=True)(inputs))


@not_stateful_on_torch
def test_stateful_layers():
    # On JAX Keras begins each batch with states of zero, where the literal reading carries them.
    literal = BACKEND != "jax"
    check_training(
        stateful, fitting(sequences(8), None, batch_size=None), compiling(), literal=literal
    )


@pytest.mark.slow
@not_stateful_on_torch
def test_stateful_layers_fed_with_arrays():
    x, y = (np.concatenate(a) for a in zip(*sequences(8).as_numpy_iterator()))
    check_training(stateful, fitting(x, y, batch_size=4), compiling(), literal=False)


@not_stateful_on_torch
def test_stateful_layers_need_sub_batches_of_one_size():
    model = stateful(RegularizedModel)
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=3))
    message = "must be a multiple of `num_sub_batches`.*Received: batch size=4, num_sub_batches=3"
    with pytest.raises(ValueError, match=message):
        model.fit(sequences(8), verbose=0, shuffle=False)


def test_sub_batches_of_stateful_layers_are_refused():
    inputs = keras.Input(batch_shape=(2, 3, 1))
    model = RegularizedModel(inputs, keras.layers.LSTM(2, stateful=True)(inputs))
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(main_gradient="sub_batches"))
    with pytest.raises(ValueError, match="Stateful recurrent layers must see whole batches"):
        model.train_on_batch(np.ones((2, 3, 1)), np.ones((2, 2)))


# Several devices

draw = np.random.default_rng(0)
LONG_X, LONG_Y = draw.normal(size=(24, 3, 4)), draw.normal(size=(24, 2))


def trained_recurrent(batch_size, num_sub_batches):
    """Return a model trained for three steps of eight examples, and R_alpha.

    Args:
        batch_size: Integer, the examples that one device sees.
        num_sub_batches: Integer.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 4), batch_size=batch_size)
    hidden = keras.layers.LSTM(5, stateful=True)(inputs)
    model = RegularizedModel(inputs, keras.layers.Dense(2)(hidden))
    regularizer = SubBatchPerturbation(0.05, 5.0, num_sub_batches)
    model.compile(keras.optimizers.SGD(1 / 8), "mse", regularizer=regularizer)
    logs = model.fit(LONG_X, LONG_Y, batch_size=8, shuffle=False, verbose=0).history
    return flat(map(numpy, model.trainable_weights)), logs["infomcr_reg"]


def assert_equal_to_one_device(several, one):
    """Compare in float64, where sums in another order are 1e-16 of each number, three steps."""
    np.testing.assert_allclose(several[0], one[0], rtol=0, atol=1e-12)
    assert several[1] == pytest.approx(one[1], rel=1e-12)


@pytest.mark.slow
def test_stateful_recurrent_layers_take_shares_of_the_sub_batches(mirrored):
    with mirrored.scope():
        several = trained_recurrent(4, 4)
    assert_equal_to_one_device(several, trained_recurrent(8, 4))


@pytest.mark.parametrize("kind", ["data parallel", "model parallel"])
@only_on("jax", reason="`keras.distribution` works on JAX alone.")
def test_states_of_recurrent_layers_are_those_of_one_device(kind):
    """The states belong to the rows of the whole batch, which is then cut as on one device."""
    one = trained_recurrent(8, 8)
    keras.distribution.set_distribution(distribution(kind))
    try:
        assert_equal_to_one_device(trained_recurrent(8, 8), one)
    finally:
        keras.distribution.set_distribution(None)


def distribution(kind):
    if kind == "data parallel":
        return keras.distribution.DataParallel()
    mesh = keras.distribution.DeviceMesh(
        (2, 2), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
