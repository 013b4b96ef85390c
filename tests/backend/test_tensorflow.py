"""What the TensorFlow backend does about the size of its graphs."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.core.sub_batch_averages import accumulate
from keras_infomcr.regularizers import SubBatchPerturbation

if BACKEND != "tensorflow":
    pytest.skip("of TensorFlow's graphs", allow_module_level=True)

import tensorflow as tf


def operations(num_sub_batches, **kwargs):
    """Return the operations of a training step's graph, with the functions that it calls."""
    inputs = keras.Input((3,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(4, "relu")(inputs))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(x))
    model.compile(
        "sgd", "mse", regularizer=SubBatchPerturbation(num_sub_batches=num_sub_batches, **kwargs)
    )
    graph = tf.function(model.train_step).get_concrete_function(
        (tf.zeros((32, 3)), tf.zeros((32, 2)))
    )
    definition = graph.graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return [node.op for node in nodes]


@pytest.mark.parametrize(
    "options, of_each",
    [
        # Predictions are taken out of the loop: an index, a shape, a read.
        pytest.param({"main_gradient": "sub_batches"}, 3, marks=pytest.mark.slow),
        pytest.param(
            {"main_gradient": "sub_batches", "num_perturbed": 2}, 3, marks=pytest.mark.slow
        ),
        pytest.param(
            {"main_gradient": "sub_batches", "estimator": "hessian_vector_product"},
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param({"main_gradient": "full_batch"}, 0, marks=pytest.mark.slow),
        pytest.param(
            {"main_gradient": "full_batch", "num_perturbed": 2}, 0, marks=pytest.mark.slow
        ),
        pytest.param(
            {"main_gradient": "full_batch", "estimator": "hessian_vector_product"},
            0,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_graph_does_not_grow_with_the_sub_batches(options, of_each):
    growth = len(operations(16, **options)) - len(operations(4, **options))
    assert growth <= of_each * 12


@pytest.mark.slow
def test_pass_over_a_sub_batch_is_traced_once():
    # Two layers: two products forwards, three backwards, as the inputs need no gradient.
    assert operations(8, main_gradient="sub_batches").count("MatMul") == 5
    assert operations(8, main_gradient="full_batch").count("MatMul") == 10


def steps(i, state):
    """Return a sum of some, a mask on the output, and a state that counts."""
    output = tf.ones((tf.cast(i, tf.int32) + 1, 2)) * state[0]
    output._keras_mask = tf.fill((tf.cast(i, tf.int32) + 1,), state[0] > 1)
    return [2 * state[0], None], (output, None), [state[0] + 1]


def test_loop_does_what_accumulation_does():
    loop = backend.rolled_into_loop(accumulate, compiled=False)
    assert loop is accumulate  # eagerly there is nothing to gain

    @tf.function(autograph=False)
    def in_graph():
        (total, nothing), outputs = backend.rolled_into_loop(accumulate, compiled=False)(
            steps, [tf.constant(1.0)], 3
        )
        assert nothing is None and all(none is None for _, none in outputs)
        return total, [o for o, _ in outputs], [o._keras_mask for o, _ in outputs]

    total, outputs, masks = in_graph()
    (expected, _), expected_outputs = accumulate(steps, [tf.constant(1.0)], 3)
    assert float(total) == float(expected) == 2 + 4 + 6
    for output, mask, (other, _) in zip(outputs, masks, expected_outputs):
        np.testing.assert_array_equal(output, other)
        np.testing.assert_array_equal(mask, other._keras_mask)


def test_ragged_outputs_are_accumulated_without_a_loop():
    @tf.function(autograph=False)
    def in_graph():
        def step(i, state):
            return [tf.ones(())], tf.RaggedTensor.from_row_lengths(tf.range(i + 1), [i + 1]), state

        return backend.rolled_into_loop(accumulate, compiled=False)(step, [], 2)

    (total,), outputs = in_graph()
    assert float(total) == 2
    assert [o.to_list() for o in outputs] == [[[0]], [[0, 1]]]


def test_sums_of_unknown_shape_are_accumulated_without_a_loop():
    @tf.function(autograph=False, input_signature=[tf.TensorSpec((None,))])
    def in_graph(array):
        return backend.rolled_into_loop(accumulate, compiled=False)(
            lambda i, s: ([array], (), s), [], 2
        )

    (total,), _ = in_graph(tf.ones(3))
    np.testing.assert_array_equal(total, [2, 2, 2])


def test_xla_compiles_no_loop():
    @tf.function(autograph=False)
    def in_graph():
        assert backend.rolled_into_loop(accumulate, compiled=True) is accumulate
        return tf.zeros(())

    in_graph()
