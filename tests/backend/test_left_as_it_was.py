"""Differentiation leaves variables, generators and functions of the framework as they were."""

import concurrent.futures
import dataclasses
import threading

import keras
import numpy as np
import pytest
from contract_networks import (
    CASES,
    ESTIMATORS,
    NAMED,
    NORMALIZATIONS,
    ROWS,
    Net,
    at_once,
    dropped_and_normalized,
    each,
    flat,
    on_tensorflow,
    on_torch,
    regularize,
)
from frameworks import numpy

from keras_infomcr import backend

pytestmark = pytest.mark.usefixtures("fast_compilation")


def all_primitives(net):
    """Take every derivative of a network once."""
    at_once(backend.value_and_grad(net.objective), *net.point())
    at_once(backend.value_grad_and_hessian_product(net.objective), *net.point(None))
    for make_rows in ROWS.values():
        make_rows(net.example_losses)(net.weights, net.state, *net.args)


def test_variables_are_left_as_they_were():
    net = Net(dataclasses.replace(NAMED["batch_norm"], layers=dropped_and_normalized), "float32")
    before = [numpy(v).copy() for v in net.model.variables]
    all_primitives(net)
    for variable, value in zip(net.model.variables, before):
        np.testing.assert_array_equal(numpy(variable), value)


def test_sub_batches_draw_masks_of_their_own(float64):
    first, second = Net(NAMED["dropout"]).masks([4, 4])
    assert np.any(first != second)
    assert set(np.unique(first)) == {0.0, 2.0}


def replaced_functions():
    """Return what the TensorFlow backend replaces for second derivatives."""
    import tensorflow as tf

    return [tf.nn.moments, tf.image.resize]


@on_tensorflow
@each(NORMALIZATIONS)
def test_replaced_functions_are_restored(case):
    before = replaced_functions()
    net = Net(case, "float32")
    backend.value_grad_and_hessian_product(net.objective)(*net.point(None))
    assert replaced_functions() == before


@on_tensorflow
def test_replaced_functions_are_restored_after_an_exception():
    import tensorflow as tf

    before = replaced_functions()
    during = []

    def fails(weights):
        during.extend(replaced_functions())
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        backend.value_grad_and_hessian_product(fails)([tf.ones(2)], None)
    assert not set(during) & set(before)
    assert replaced_functions() == before


@on_tensorflow
def test_replaced_functions_are_restored_by_threads_that_leave_in_the_order_they_came():
    import tensorflow as tf

    before = replaced_functions()
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first(weights):
        assert second_is_in.wait(60)
        return tf.reduce_sum(weights[0] ** 3), None

    def second(weights):
        second_is_in.set()
        assert first_is_out.wait(60)
        # Still replaced, although the thread that came first has left.
        assert not set(replaced_functions()) & set(before)
        return tf.reduce_sum(weights[0] ** 3), None

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        arguments = [tf.ones(2)], None
        leaving = pool.submit(backend.value_grad_and_hessian_product(first), *arguments)
        staying = pool.submit(backend.value_grad_and_hessian_product(second), *arguments)
        leaving.result()
        first_is_out.set()
        staying.result()
    assert replaced_functions() == before


@on_torch
@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_parameters_keep_their_grad_and_requires_grad(recording):
    import torch

    net = Net(NAMED["dense"], "float32")
    parameters = [v.value for v in net.model.trainable_variables]
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    parameters[1].requires_grad_(False)
    before = [(p.grad, p.requires_grad) for p in parameters]
    with torch.set_grad_enabled(recording):
        all_primitives(net)
        regularize(net, *ESTIMATORS)
        assert torch.is_grad_enabled() == recording
    assert all(p.grad is g and p.requires_grad == r for p, (g, r) in zip(parameters, before))
    assert torch.all(parameters[0].grad == 7.0)


@on_torch
def test_results_hold_no_graph():
    net = Net(NAMED["dense"], "float32")
    results = [
        backend.value_and_grad(net.objective)(*net.point()),
        backend.value_grad_and_hessian_product(net.objective)(*net.point(None)),
        backend.jacobian(net.example_losses)(net.weights, net.state, *net.args),
        backend.gradients_by_example(net.example_losses)(net.weights, net.state, *net.args),
    ]
    assert not any(a.requires_grad for a in keras.tree.flatten(results))


@on_torch
def test_generator_is_left_as_it_was():
    import torch

    net = Net(NAMED["unseeded_dropout"], "float32")
    before = torch.get_rng_state()
    all_primitives(net)
    regularize(net, *ESTIMATORS)
    assert torch.equal(torch.get_rng_state(), before)


@on_torch
def test_generator_is_left_as_it_was_after_an_exception():
    import torch

    net = Net(NAMED["unseeded_dropout"], "float32")

    def fails(weights, state, batch):
        net.objective(weights, state, batch)
        with net.objective.at(weights, state, training=True) as (predict, _):
            predict(batch.x)
            raise ArithmeticError

    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        backend.value_and_grad(fails)(*net.point())
    assert torch.equal(torch.get_rng_state(), before)


@each([case for case in CASES if case.drops])
def test_both_evaluations_of_a_pair_see_the_same_mask(float64, case):
    net = Net(case)
    [(_, gradient, loss_gradient)] = regularize(net, "finite_difference", alpha=1e-9)
    # alpha times H g, against a difference of the order of g if the masks differed.
    assert np.linalg.norm(flat(loss_gradient)) > 0.1
    assert np.linalg.norm(flat(gradient)) < 1e-7
