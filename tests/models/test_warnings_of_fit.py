"""What `fit` warns of, and how often."""

import keras
import numpy as np
import pytest
from small_nets import QUICKEST, X, Y, sgd, two_layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


def count_user_warnings(warned):
    return sum(issubclass(w.category, UserWarning) for w in warned)


def test_train_step_without_the_inherited_one_warns():
    class Net(RegularizedModel):
        def train_step(self, *args):
            return keras.Model.train_step(self, *args)

    model = two_layers(Net)
    model.compile(sgd(), "mse")
    with pytest.warns(UserWarning, match="The regulariser did not act.*Call `super") as warned:
        model.fit(X, Y, epochs=2, verbose=0)
    assert count_user_warnings(warned) == 1


def test_more_sub_batches_than_examples_warns_once():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6))
    message = "No batch held as many examples as there are sub-batches.*num_sub_batches=6"
    with pytest.warns(UserWarning, match=message) as warned:
        model.fit(X, Y, 5, epochs=2, verbose=0)
        model.fit(X, Y, 5, verbose=0)
    assert count_user_warnings(warned) == 1


def test_one_batch_large_enough_does_not_warn():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6), **QUICKEST)
    model.fit(X, Y, 6, verbose=0)  # a warning is an error here


def test_closed_gate_does_not_warn():
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=6), **QUICKEST)
    model.regularizer_active = False
    model.fit(X, Y, 5, verbose=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_warn_once(value):
    model = two_layers(RegularizedModel)
    model.compile(sgd(), "mse", regularizer=SubBatchPerturbation(num_sub_batches=2), **QUICKEST)
    x = X.copy()
    x[3] = value
    with pytest.warns(UserWarning, match=r"not finite.*Received: infomcr_reg=nan") as warned:
        model.fit(x, Y, 5, epochs=2, verbose=0)
    assert count_user_warnings(warned) == 1
