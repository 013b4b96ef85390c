"""Both evaluations of a pair draw the same random numbers, and leave no trace.

With a loss that is linear in the weights, the gradient depends on the masks of dropout alone.
"""

import keras
import numpy as np
import pytest
from algorithm_1 import flat
from frameworks import array, numpy

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation


class LinearLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.sum(y_pred, axis=-1)


def linear_model(**kwargs):
    inputs = keras.Input((30,))
    x = keras.layers.Dropout(0.5)(inputs)
    x = keras.layers.GaussianNoise(1.0)(x)
    model = RegularizedModel(inputs, keras.layers.Dense(2)(x))
    regularizer = SubBatchPerturbation(alpha=0.5, beta=1e6, num_sub_batches=3)
    model.compile(keras.optimizers.SGD(0.1), LinearLoss(), regularizer=regularizer, **kwargs)
    return model


def test_both_evaluations_of_a_pair_draw_the_same_numbers(rng):
    model = linear_model()
    model.regularizer.main_gradient = "sub_batches"
    x = array(rng.normal(size=(6, 30)), "float32")
    result = model.regularizer(Objective(model), Batch(x, array(np.zeros((6, 2)), "float32")), [])
    # The gradient is the mean of the masked x, whatever the weights are. If both evaluations draw
    # the same masks, the difference of their gradients is exactly 0.
    np.testing.assert_array_equal(flat(result.gradient), 0)
    assert np.linalg.norm(flat(result.main.gradients)) > 1
    assert float(result.value) > 1  # alpha times the mean of ||g_i||^2


def test_sub_batches_draw_numbers_of_their_own():
    model = linear_model()
    model.regularizer.main_gradient = "sub_batches"
    x = array(np.ones((6, 30)), "float32")
    result = model.regularizer(Objective(model), Batch(x, array(np.zeros((6, 2)), "float32")), [])
    first, second, third = np.split(numpy(result.main.predictions), 3)
    assert not np.allclose(first, second) and not np.allclose(second, third)


@pytest.mark.parametrize(
    "mode",
    [{}, {"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_same_numbers_are_drawn_within_a_training_step(rng, mode):
    x, y = rng.normal(size=(6, 30)).astype("float32"), np.zeros((6, 2), "float32")
    model = linear_model(**mode)
    initial = [v.numpy() for v in model.variables]  # seeds too
    trained = []
    for beta in (0.0, 1e6):
        keras.utils.set_random_seed(0)
        for variable, value in zip(model.variables, initial):
            variable.assign(value)
        model.regularizer.beta = beta
        model.train_on_batch(x, y)
        trained.append(flat(model.trainable_variables))
    # Different masks would add some 1e5. XLA may round the two gradients differently.
    np.testing.assert_allclose(trained[1], trained[0], atol=0.2 if "jit_compile" in mode else 0)


def test_evaluations_leave_no_trace(rng):
    inputs = keras.Input((30,))
    x = keras.layers.Dense(4)(keras.layers.Dropout(0.5)(inputs))
    model = RegularizedModel(inputs, keras.layers.BatchNormalization()(x))
    regularizer = SubBatchPerturbation(num_sub_batches=2)
    model.compile("sgd", "mse", metrics=["mae"], regularizer=regularizer)
    x = rng.normal(size=(6, 30)).astype("float32")
    model.train_on_batch(x, np.ones((6, 4)))
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    before = [v.numpy() for v in variables]
    result = model.regularizer(
        Objective(model), Batch(array(x), array(np.ones((6, 4)), "float32")), []
    )
    assert np.isfinite(flat(result.gradient)).all()
    for value, variable in zip(before, variables):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)
