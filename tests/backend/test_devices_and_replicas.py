"""Compiled functions, float64, devices and replicas."""

import keras
import numpy as np
import pytest
from contract_networks import (
    NAMED,
    Net,
)
from frameworks import array, numpy, only_on

from keras_infomcr import backend

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_float64_within_a_compiled_function():
    """Products of float32 numbers are exact in float64, and rounded outside of it."""
    numbers = np.array([1 + 2**-12, 3.0], "float32")

    def squares(x):
        with backend.float64_allowed():
            x = keras.ops.cast(x, "float64")
            return x * x

    result = numpy(backend.compiled(squares)(array(numbers)))
    assert result.dtype == "float64"
    np.testing.assert_array_equal(result, numbers.astype("float64") ** 2)


def test_an_array_delayed_until_another_is_the_array():
    function = backend.compiled(lambda x, y: backend.delayed_until(x, y + 1.0))
    np.testing.assert_array_equal(numpy(function(array([1.0, 2.0]), array([3.0]))), [1.0, 2.0])


def test_a_multiple_is_added():
    found = backend.plus_multiple(array([1.0, 2.0]), -0.5, array([4.0, 8.0]))
    np.testing.assert_array_equal(numpy(found), [-1.0, -2.0])


def test_numbers_at_hand_are_not_traced():
    assert not backend.is_traced(array([1.0]))


@only_on("tensorflow", "jax", reason="torch compiles nothing here")
def test_numbers_of_a_compiled_function_are_traced():
    seen = []
    backend.compiled(lambda x: (seen.append(backend.is_traced(x)), x)[1])(array([1.0]))
    assert seen == [True]


def test_no_device_is_the_usual_one():
    assert numpy(backend.on_device(None, lambda x: x + 1.0, array(1.0))) == 2.0


# Replicas


def test_one_device_is_one_replica_and_the_chief():
    model = Net(NAMED["dense"], "float32").model
    assert backend.num_replicas(model) == backend.num_parallel_steps(model) == 1
    assert backend.is_chief(model)
    backend.wait_for_workers(model)


def test_one_replica_keeps_what_is_its_own():
    means, predictions = backend.over_replicas(lambda batch: (batch[0] + 1, batch[1]))((1, 2))
    assert (means, predictions) == (2, 2)
    np.testing.assert_array_equal(numpy(backend.mean_over_steps(array([3.0, 4.0]))), [3.0, 4.0])
