"""Whatever is passed, an error says what must hold and what was received."""

import keras
import numpy as np
import pytest

from keras_infomcr import RegularizedModel, validation
from keras_infomcr.flatness import gamma_hat, hessian_trace
from keras_infomcr.regularizers import SubBatchPerturbation

HUGE = 10**400  # no float holds it


@pytest.mark.parametrize("check", [validation.positive, validation.non_negative])
def test_integers_beyond_all_floats_are_refused(check):
    with pytest.raises(ValueError, match=r"`size` must be a finite number.* Received: size=1000"):
        check(size=HUGE)


def test_counts_beyond_all_floats_are_refused():
    with pytest.raises(ValueError, match=r"`count` must be an integer of at least 1\. Received: "):
        validation.integer(minimum=1, count=HUGE)
    with pytest.raises(ValueError, match=r"`ratio` must be a number in \(0, 1\]"):
        validation.fraction(ratio=HUGE)


@pytest.mark.parametrize("value", [1.0, 1, -1e-9, np.nan, True, "0", HUGE], ids=repr)
def test_what_is_not_below_one(value):
    with pytest.raises(
        ValueError, match=r"`momentum` must be a number in \[0, 1\)\. Received: mome"
    ):
        validation.below_one(momentum=value)
    validation.below_one(momentum=0, averaging=np.float32(0.75))


@pytest.mark.parametrize("value", [np.zeros(2), np.nan, np.inf, "0", None, HUGE], ids=repr)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"`loss` must be a number or -inf\. Received: loss="):
        validation.number(loss=value)
    validation.number(loss=-np.inf)


@pytest.mark.parametrize("flag", [True, False, np.True_, np.False_])
def test_truth_values_of_numpy_are_truth_values(flag):
    validation.boolean(flag=flag)
    with pytest.raises(ValueError, match=r"`count` must be an integer of at least 0\. Received: "):
        validation.integer(minimum=0, count=flag)
    with pytest.raises(ValueError, match=r"`size` must be a finite number, 0 or greater"):
        validation.non_negative(size=flag)


def test_the_gate_takes_truth_values_of_numpy():
    inputs = keras.Input((2,))
    model = RegularizedModel(inputs, keras.layers.Dense(1)(inputs))
    model.regularizer_active = np.False_
    assert model.regularizer_active is False


@pytest.mark.parametrize(
    "value",
    [np.array(["auto", "full_batch"]), np.array("auto"), ["auto"], {"auto": 1}, None],
    ids=repr,
)
def test_what_is_no_string_is_none_of_several_strings(value):
    message = "`main_gradient` must be one of 'auto', 'full_batch', 'sub_batches'. Received: main"
    with pytest.raises(ValueError, match=message):
        SubBatchPerturbation(main_gradient=value)


def test_a_tensor_is_none_of_several_strings():
    with pytest.raises(ValueError, match=r"`verbose` must be one of 0, 1\. Received: verbose="):
        validation.one_of(0, 1, verbose=keras.ops.ones(3))


@pytest.mark.parametrize("value", ["auto", np.str_("auto")])
def test_strings_of_numpy_are_strings(value):
    validation.one_of("auto", "full_batch", main_gradient=value)


@pytest.mark.parametrize("value", [np.array(["auto", "auto"]), np.array([5, 5]), [5], HUGE])
def test_numbers_of_trials_that_are_none(value):
    with pytest.raises(ValueError, match=r"`num_trials` must be an integer of at least 1\. Rec"):
        gamma_hat(None, None, num_trials=value)
    with pytest.raises(ValueError, match=r"`num_trials` must be an integer of at least 1\. Rec"):
        hessian_trace(None, None, num_trials=value)
