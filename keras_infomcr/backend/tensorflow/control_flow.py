"""TensorFlow: graphs, loops and branches in them, and rows of arrays.

Keras keeps the mask of a tensor as an attribute, which graphs, loops and branches do not pass on:
here masks travel as results of their own.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_infomcr.backend.tensorflow.random import draws_refused
from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask


def compiled(function: Callable) -> Callable:
    """Return a graph function."""

    def checked(*args):
        with draws_refused():
            return function(*args)

    return tf.function(checked, reduce_retracing=True, autograph=False)


def delayed_until(array: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Return the array, once the other is known."""
    with tf.control_dependencies([other]):
        return tf.identity(array)


def is_traced(array) -> bool:
    """Return whether the array stands for numbers that are not known yet."""
    return tf.is_symbolic_tensor(array)


def batch_size(batch) -> int | tf.Tensor:
    """Return the number of examples, a Python integer where it is known while tracing."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    if first.shape[0] is not None:
        return int(first.shape[0])
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.cast(tf.shape(first)[0], tf.int32)


def slice_rows(array, start, length):
    """Return rows of a dense, ragged or sparse tensor."""
    if isinstance(array, tf.RaggedTensor):
        return array[start : start + length]
    if not isinstance(array, tf.SparseTensor):
        part = array[start : start + length]
        # Layers ask for the shapes that slicing forgets.
        part.set_shape([length if isinstance(length, int) else None, *array.shape[1:]])
        return part
    shape = tf.cast(array.dense_shape, tf.int64)
    start, length = tf.cast(start, tf.int64), tf.cast(length, tf.int64)
    begin = tf.concat([[start], tf.zeros_like(shape[1:])], axis=0)
    part = tf.sparse.slice(array, begin, tf.concat([[length], shape[1:]], axis=0))
    static = [None, *array.shape[1:]]
    return tf.SparseTensor(
        part.indices, part.values, tf.ensure_shape(part.dense_shape, [len(static)])
    )


def sum_by_number(rows: tf.Tensor, numbers: tf.Tensor, count: int) -> tf.Tensor:
    """Return the sums of the rows of each number."""
    return tf.math.unsorted_segment_sum(rows, numbers, count)


def traced_once(function: Callable) -> Callable:
    """Return the function as a graph of its own, which takes and returns tensors."""
    if _must_stay_open():
        return function

    @tf.function(autograph=False)
    def graph(*args):
        results = function(*args)
        return results, [get_keras_mask(r) for r in keras.tree.flatten(results)]

    def traced(*args):
        return _with_masks(*graph(*args))

    return traced


def rolled_into_loop(accumulate: Callable, compiled: bool) -> Callable:
    """Return a function like `accumulate` whose graph has one step, executed in a loop.

    Not under XLA, which on CPUs is many times slower at convolutions within loops.
    """
    if compiled or _must_stay_open():
        return accumulate

    def loop(step, state, count):
        @tf.function(autograph=False)
        def graph(i, state):
            summands, output, next_state = step(i, state)
            masks = [get_keras_mask(o) for o in keras.tree.flatten(output)]
            return summands, (output, masks), next_state

        specs = tf.nest.map_structure(tf.type_spec_from_value, state)
        once = graph.get_concrete_function(tf.TensorSpec((), tf.int32), specs)
        summands, outputs, _ = once.structured_outputs
        ragged = any(isinstance(o, tf.__internal__.CompositeTensor) for o in _present(outputs))
        if ragged or not all(s.shape.is_fully_defined() for s in _present(summands)):
            return accumulate(step, state, count)  # what a loop cannot hold

        def body(i, sums, arrays, state):
            summands, outputs, state = once(i, state)
            sums = [s + t for s, t in zip(sums, _present(summands))]
            arrays = [a.write(i, o) for a, o in zip(arrays, _present(outputs))]
            return i + 1, sums, arrays, state

        sums = [tf.zeros(s.shape, s.dtype) for s in _present(summands)]
        arrays = [
            tf.TensorArray(o.dtype, count, element_shape=o.shape, infer_shape=False)
            for o in _present(outputs)
        ]
        _, sums, arrays, _ = tf.while_loop(
            lambda i, *_: i < count,
            body,
            (tf.constant(0), sums, arrays, state),
            parallel_iterations=2,  # small batches leave cores idle; more take more memory
            maximum_iterations=count,
        )
        steps = [
            _with_masks(*_filled(outputs, [array.read(i) for array in arrays]))
            for i in range(count)
        ]
        return _filled(summands, sums), steps

    return loop


def cond(predicate: tf.Tensor, true_function: Callable, false_function: Callable):
    """Call one of two functions."""
    # `tf.cond` returns tensors alone: where the structures have `None` is remembered beside it.
    structures = []

    def flat(function):
        def call():
            results = function()
            masks = [get_keras_mask(r) for r in keras.tree.flatten(results)]
            structures.append((results, masks))
            return _present((results, masks))

        return call

    found = tf.cond(predicate, flat(true_function), flat(false_function))
    return _with_masks(*_filled(structures[0], found))


def _must_stay_open():
    """Return whether functions must not become graphs of their own."""
    # Loops of several replicas in one process can wait for each other without end: TensorFlow
    # gives each a thread, and has as many as the machine has cores.
    return tf.executing_eagerly() or tf.distribute.get_strategy().num_replicas_in_sync > 1


def _present(structure):
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def _filled(structure, values):
    """Return values in a structure whose leaves stand for them, or are `None`."""
    values = iter(values)
    flat = [None if leaf is None else next(values) for leaf in tf.nest.flatten(structure)]
    return tf.nest.pack_sequence_as(structure, flat)


def _with_masks(results, masks):
    for result, mask in zip(keras.tree.flatten(results), masks):
        if mask is not None:
            set_keras_mask(result, mask)
    return results
