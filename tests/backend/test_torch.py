"""What torch users count on: parameters' flags, the random generator, data on the device."""

import collections

import keras
import numpy as np
import pytest
from frameworks import BACKEND

if BACKEND != "torch":
    pytest.skip("properties of torch", allow_module_level=True)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.core.sub_batch_averages import accumulate
from keras_infomcr.flatness import gamma_hat
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, size=12)
ESTIMATORS = ["finite_difference", "hessian_vector_product"]


def compiled(base=RegularizedModel, dropout=0.0, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(5, "tanh")(inputs))
    model = base(inputs, keras.layers.Dense(3)(keras.layers.Dropout(dropout)(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **kwargs)
    return model


def regularized(estimator="finite_difference", beta=1.0, **kwargs):
    rule = SubBatchPerturbation(0.01, beta, 3, estimator=estimator)
    return compiled(regularizer=rule, **kwargs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_grad_and_requires_grad_are_left_as_found(estimator):
    model = regularized(estimator)
    model.layers[1].bias.value.requires_grad_(False)
    model.layers[1].bias.trainable = False
    parameters = [v.value for v in model.variables if torch.is_floating_point(v.value)]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, i) if parameter.requires_grad else None
    before = [(p.grad, p.requires_grad, p.grad_fn) for p in parameters]
    model.fit(X, Y, 4, verbose=0)
    gamma_hat(model, X, Y, num_examples=4, num_trials=2)
    for i, (parameter, (grad, *flags)) in enumerate(zip(parameters, before)):
        assert parameter.grad is grad
        assert grad is None or torch.all(grad == i)
        assert [parameter.requires_grad, parameter.grad_fn] == flags


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unseeded_dropout_draws_as_in_plain_keras(estimator):
    """The regulariser forks torch's global generator: with beta = 0 the same masks are seen."""
    models = regularized(estimator, beta=0.0, dropout=0.5), compiled(keras.Model, dropout=0.5)
    after = []
    for model in models:
        keras.utils.set_random_seed(1)
        model.fit(X, Y, 4, epochs=3, verbose=0)
        after.append(torch.rand(3))
    for ours, plain in zip(*(model.get_weights() for model in models)):
        np.testing.assert_array_equal(ours, plain)
    assert torch.equal(*after)


def test_unseeded_dropout_is_the_same_in_a_pair():
    """Of a linear model R_alpha / alpha does not depend on alpha, unless masks differ."""
    values = []
    for alpha in (1e-3, 1e-1):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(1)(keras.layers.Dropout(0.5)(inputs))
        model = RegularizedModel(inputs, outputs)
        rule = SubBatchPerturbation(alpha, 1.0, 3)
        model.compile("sgd", lambda y, y_pred: y_pred[:, 0], regularizer=rule)
        logs = model.fit(X, Y, 12, verbose=0).history
        values.append(logs["infomcr_reg"][0] / alpha)
    # The loss is of order 1: its difference is rounded to 1e-7, over alpha 1e-4.
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[0] > 0.1


class Operations(TorchDispatchMode):
    """Counts operations, those that make the host wait for a device among them."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_reads_no_more_from_the_device_than_keras_does(estimator):
    """Keras's SGD reads the learning rate."""
    counts = []
    for model in (compiled(keras.Model), regularized(estimator)):
        with Operations() as operations:
            model.train_step((torch.from_numpy(X), torch.from_numpy(Y)))
        counts.append(operations.counts)
    reads = [c[torch.ops.aten._local_scalar_dense] for c in counts]
    assert reads == [1, 1]
    assert counts[1].total() > 2 * counts[0].total()


def test_tensors_that_need_a_gradient_are_measured():
    x = torch.from_numpy(X).requires_grad_()
    model, settings = compiled(), {"num_examples": 4, "num_trials": 3, "seed": 0}
    expected = gamma_hat(model, X, Y, **settings).trials
    np.testing.assert_array_equal(gamma_hat(model, x, Y, **settings).trials, expected)


def of_modules():
    """Return a net of torch's own modules, and the same of Keras's layers."""
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5, eps=1e-3), torch.nn.Tanh()
    )
    torch_layers = [keras.layers.TorchModuleWrapper(module, output_shape=(None, 5))]
    keras_layers = [
        keras.layers.Dense(5),
        keras.layers.BatchNormalization(epsilon=1e-3),
        keras.layers.Activation("tanh"),
    ]
    models = []
    for layers in (torch_layers, keras_layers):
        inputs = x = keras.Input((4,))
        for layer in [*layers, keras.layers.Dense(3)]:
            x = layer(x)
        models.append(RegularizedModel(inputs, x))
    wrapped, plain = models
    weights = [v.numpy() for v in wrapped.trainable_variables]
    for variable, value in zip(plain.trainable_variables, [weights[0].T, *weights[1:]]):
        variable.assign(value)
    return wrapped, plain, module


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_modules_of_torch_are_regularized_as_layers_of_keras_are(estimator):
    wrapped, plain, _ = of_modules()
    rule = {"estimator": estimator, "num_sub_batches": 3, "alpha": 0.1}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for model in (wrapped, plain):
        model.compile(keras.optimizers.SGD(0.1), loss, regularizer=SubBatchPerturbation(**rule))
    logs = [m.fit(X, Y, 12, epochs=3, shuffle=False, verbose=0).history for m in (wrapped, plain)]
    # Three steps in float32; the regulariser is a difference of losses a hundred times as large.
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(logs[0]["infomcr_reg"], logs[1]["infomcr_reg"], rtol=1e-3)
    assert min(logs[0]["infomcr_reg"]) > 1e-3


def test_modules_of_torch_are_measured_and_left_as_they_were():
    wrapped, plain, module = of_modules()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for model in (wrapped, plain):
        model.compile("sgd", loss, regularizer=None)
    module.train()
    buffers = [buffer.clone() for buffer in module.buffers()]
    for training in (False, True):
        settings = {"num_examples": 6, "num_trials": 2, "seed": 0, "training": training}
        ours, expected = (gamma_hat(model, X, Y, **settings).trials for model in (wrapped, plain))
        np.testing.assert_allclose(ours, expected, rtol=1e-3)
    assert all(map(torch.equal, buffers, module.buffers()))
    assert module.training


def test_buffers_of_modules_move_as_in_keras():
    """Also of a wrapped model, of modules called one by one, and past a layer's own `call`."""

    class OneByOne(keras.Model):
        def __init__(self):
            super().__init__()
            norm = torch.nn.BatchNorm1d(5)
            self.net = keras.layers.TorchModuleWrapper(
                torch.nn.Sequential(torch.nn.Linear(4, 5), norm)
            )
            self.out = keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.out(self.net.module[1](self.net.module[0](x)))

    buffers = []
    for beta in (None, 0.0, 50.0):
        keras.utils.set_random_seed(0)
        model = OneByOne()
        module = model.net.module
        if beta is not None:
            model = RegularizedModel.from_model(model)
        rule = {} if beta is None else {"regularizer": SubBatchPerturbation(0.1, beta, 3)}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, **rule)
        logs = model.fit(X, Y, 6, epochs=2, shuffle=False, verbose=0).history
        buffers.append([buffer.numpy().copy() for buffer in module.buffers()])
        kernel = module[0].weight.detach().numpy().copy()
        buffers[-1].append(kernel)
    plain, zero, regularized = buffers
    for a, b in zip(plain, zero):
        np.testing.assert_array_equal(a, b)
    assert regularized[2] == plain[2] > 0  # the number of batches
    assert np.abs(regularized[3] - plain[3]).max() > 1e-4  # the regulariser reaches the module
    assert min(logs["infomcr_reg"]) > 1e-3


def test_sub_batches_of_modules_with_buffers_are_refused():
    wrapped, _, _ = of_modules()
    rule = SubBatchPerturbation(main_gradient="sub_batches")
    wrapped.compile("sgd", "mse", regularizer=rule)
    with pytest.raises(ValueError, match=r"Torch modules with buffers.*must see whole batches"):
        wrapped.fit(X, np.ones((12, 3)), verbose=0)


def test_parameters_frozen_past_keras_stay():
    for main_gradient in ("full_batch", "sub_batches"):
        model = regularized(beta=5.0)
        model.regularizer.main_gradient = main_gradient
        model.layers[1].kernel.value.requires_grad_(False)
        before = model.get_weights()
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            model.fit(X, Y, 4, verbose=0)
        moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights())]
        assert moved[:2] == [False, True]


def test_masks_reach_the_metrics_whatever_the_main_gradient():
    words, targets = np.array([[1, 2, 0], [1, 0, 0], [2, 3, 4], [2, 0, 0]]), np.ones((4, 3, 2))
    errors = []
    for main_gradient in ("full_batch", "sub_batches"):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
        model = RegularizedModel(inputs, keras.layers.LSTM(2, return_sequences=True)(x))
        rule = SubBatchPerturbation(num_sub_batches=2, main_gradient=main_gradient)
        model.compile("sgd", "mse", metrics=["mae"], regularizer=rule)
        errors += model.fit(words, targets, 4, verbose=0).history["mae"]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_second_derivatives_in_a_compiled_step():
    logs = []
    for jit_compile in (False, True):
        model = regularized("hessian_vector_product", jit_compile=jit_compile)
        logs.append(model.fit(X, Y, 4, shuffle=False, verbose=0).history)
    # Three steps in float32, fused differently.
    for name in ("loss", "infomcr_reg"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


def test_sums_in_place_leave_the_summands_alone():
    """Gradients may share memory, with each other and with what a step keeps."""
    shared = torch.ones(3)

    def step(i, state):
        return [shared, None if i else shared, shared if i else None], i, state

    sums, outputs = backend.rolled_into_loop(accumulate, False)(step, [], 3)
    assert [s.tolist() for s in sums] == [[3.0] * 3, [1.0] * 3, [2.0] * 3]
    assert shared.tolist() == [1.0] * 3 and outputs == [0, 1, 2]
