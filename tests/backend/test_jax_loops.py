"""JAX: the sub-batches run in a loop that is as fast as what it replaces, in constant memory."""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND

if BACKEND != "jax":
    pytest.skip("JAX alone runs sub-batches in `lax.scan`.", allow_module_level=True)

import jax
from jax import numpy as jnp

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.core.sub_batch_averages import accumulate
from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask
from keras_infomcr.regularizers import SubBatchPerturbation

layers = keras.layers


def test_loop_does_what_accumulation_does():
    def step(i, state):
        output = jnp.full((2,), i + 1.0) * state[0]
        set_keras_mask(output, output > 3)
        return [2 * state[0], None], (output, None), [state[0] + 1]

    def in_loop(start):
        sums, outputs = backend.rolled_into_loop(accumulate, True)(step, [start], 3)
        return sums, outputs, [get_keras_mask(output) for output, _ in outputs]

    (total, nothing), outputs, masks = jax.jit(in_loop)(1.0)
    (expected, _), expected_outputs = accumulate(step, [jnp.float32(1.0)], 3)
    assert nothing is None and float(total) == float(expected) == 2 + 4 + 6
    for (output, none), mask, (other, _) in zip(outputs, masks, expected_outputs):
        assert none is None
        np.testing.assert_array_equal(output, other)
        np.testing.assert_array_equal(mask, get_keras_mask(other))


def test_masks_pass_a_branch():
    def branch(scale):
        output = jnp.ones((2,)) * scale
        set_keras_mask(output, output > 1)
        return output

    def chosen(which):
        found = backend.cond(which, lambda: branch(2.0), lambda: branch(1.0))
        return found, get_keras_mask(found)

    found, mask = jax.jit(chosen)(jnp.array(True))
    assert found.tolist() == [2, 2] and mask.tolist() == [True, True]


def compiled_step(count, x, outputs, **kwargs):
    """Return a compiled step of a model on 24 examples, and the bytes of its weights."""
    inputs = keras.Input(x.shape[1:])
    model = RegularizedModel(inputs, outputs(inputs))
    rule = SubBatchPerturbation(0.1, 1.0, count, **kwargs)
    model.compile("sgd", "mse", regularizer=rule)
    model.optimizer.build(model.trainable_variables)
    data = x, np.zeros((len(x), *model.output_shape[1:]), "float32")
    model._symbolic_build(data_batch=data)
    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in variables] for variables in lists)
    step = jax.jit(model.train_step).lower(state, data).compile()
    return step, sum(v.value.nbytes for v in model.trainable_variables)


RULES = [
    {"main_gradient": "sub_batches"},
    {"main_gradient": "full_batch"},
    {"main_gradient": "sub_batches", "num_perturbed": 2},
    {"main_gradient": "sub_batches", "estimator": "hessian_vector_product"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_memory_and_program_do_not_grow_with_the_sub_batches(rule):
    x = np.zeros((24, 64), "float32")
    few, many = (
        compiled_step(count, x, lambda x: layers.Dense(8)(layers.Dense(128, "tanh")(x)), **rule)
        for count in (4, 12)
    )
    size = few[1]
    used = [step.memory_analysis().temp_size_in_bytes for step, _ in (few, many)]
    # Unrolled, each further sub-batch would hold two gradients, of the size of the weights each.
    assert abs(used[1] - used[0]) < size
    lengths = [len(step.as_text()) for step, _ in (few, many)]
    assert lengths[1] < 1.1 * lengths[0]


def convolutions(x):
    x = layers.Conv2D(4, 3, 2, padding="same", activation="tanh")(x)
    x = layers.Conv2D(4, 3, dilation_rate=2, padding="same", activation="tanh")(x)
    return layers.Dense(2)(layers.GlobalAveragePooling2D()(x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs have other libraries.")
@pytest.mark.parametrize("rule", [RULES[0], RULES[2]], ids=str)
def test_convolutions_in_loops_and_branches_are_the_ones_with_fast_code(rule):
    """XLA for CPUs has fast code for one order of the axes."""
    step, _ = compiled_step(3, np.zeros((24, 8, 8, 3), "float32"), convolutions, **rule)
    orders = re.findall(r" convolution\(.*dim_labels=([\w>-]*)", step.as_text())
    # Two passes over 2 convolutions, each with 2 derivatives, by the first one's inputs none.
    assert len(orders) >= 2 * (2 * 3 - 1)
    assert set(orders) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("spec", "shapes", "options"),
    [
        (("NCHW", "OIHW", "NCHW"), ((2, 4, 7, 6), (8, 4, 3, 3)), {"window_strides": (2, 1)}),
        (
            ("HWCN", "HWOI", "CHNW"),
            ((7, 6, 4, 2), (3, 3, 8, 2)),
            {"window_strides": (1, 1), "feature_group_count": 2, "rhs_dilation": (2, 1)},
        ),
        (("NWC", "WIO", "NWC"), ((2, 7, 4), (3, 4, 8)), {"window_strides": (1,)}),
        (
            ("NHWDC", "HWDIO", "CNHWD"),
            ((2, 5, 4, 3, 2), (2, 2, 2, 1, 6)),
            {"window_strides": (1, 1, 1), "feature_group_count": 2},
        ),
    ],
)
def test_convolutions_of_any_order_give_the_same_numbers_in_branches(
    float64, rng, spec, shapes, options
):
    inputs, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)

    def loss(inputs, kernel):
        convolved = jax.lax.conv_general_dilated(
            inputs, kernel, padding="SAME", dimension_numbers=spec, **options
        )
        return jnp.sum(convolved**3), convolved

    derivative = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    expected = derivative(inputs, kernel)
    found = backend.cond(jnp.array(True), *[lambda: derivative(inputs, kernel)] * 2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        # Sums of a hundred products of numbers of order one, cubed, in float64.
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
