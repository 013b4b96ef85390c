"""TensorFlow: devices, replicas and workers of a `tf.distribute.Strategy`.

Private name of TensorFlow used here: `_in_multi_worker_mode` of a strategy, which Keras asks too.
"""

import contextlib
from collections.abc import Callable

import keras
import tensorflow as tf


def devices(model: keras.Model) -> list:
    """Return the devices of a `MirroredStrategy`."""
    strategy = model.distribute_strategy
    several = isinstance(strategy, tf.distribute.MirroredStrategy)
    return list(strategy.extended.worker_devices) if several else [None]


def on_device(device, function: Callable, *args):
    """Return what the function returns there."""
    if device is None:
        return function(*args)
    with tf.device(device):
        # The identity is what moves an array: otherwise it would stay on its own device.
        return function(*tf.nest.map_structure(tf.identity, args))


def makes_variables_in_steps():
    """Return `False`: XLA cannot lift their making out of a step."""
    return False


def variables_of(model):
    """Return a context in which variables are made for the replicas of the model."""
    if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
        return contextlib.nullcontext()  # within a step no scope can be entered
    return model.distribute_strategy.scope()


def num_replicas(model: keras.Model) -> int:
    """Return the number of replicas of the model's `tf.distribute.Strategy`."""
    return model.distribute_strategy.num_replicas_in_sync


# Each replica runs the step on its own share of the batch.
num_parallel_steps = num_replicas


def mean_over_steps(array: tf.Tensor) -> tf.Tensor:
    """Return the mean over the replicas."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, array)


def mean_over_replicas(arrays: list[tf.Tensor]) -> list[tf.Tensor]:
    """Return the means over the replicas, sent together."""
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, arrays) if arrays else []


def replica_index() -> int | tf.Tensor:
    """Return the number of the replica among all."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def over_replicas(function: Callable) -> Callable:
    """Return the function, which a step calls on its own share of the batch."""
    return function


def is_chief(model: keras.Model) -> bool:
    """Return whether this process writes checkpoints for its strategy."""
    return model.distribute_strategy.extended.should_checkpoint


def wait_for_workers(model: keras.Model) -> None:
    """Wait for the other workers of a `MultiWorkerMirroredStrategy`."""
    if is_multi_worker(model):
        # A sum is known when every worker has given its term.
        model.distribute_strategy.reduce(tf.distribute.ReduceOp.SUM, tf.ones(()), axis=None)


def is_multi_worker(model: keras.Model) -> bool:
    """Return whether several processes train the model."""
    strategy = model.distribute_strategy
    multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return multi_worker and strategy.extended._in_multi_worker_mode()


def outside_of_strategy() -> contextlib.AbstractContextManager:
    """Return a context in which layers believe to run on one device, without a strategy.

    They then synchronise nothing, and Keras divides no loss by the number of replicas. It is a
    context of a replica in TensorFlow's default strategy.
    """
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return contextlib.nullcontext()
    local_replicas = len(tf.distribute.get_strategy().extended.worker_devices)
    # The default strategy can be got only where no scope of a strategy has been entered, and a new
    # graph is such a place.
    with tf.Graph().as_default():
        strategy = tf.distribute.get_strategy()
    # With its number among the replicas of this process, by which variables know which copy is
    # read.
    number = context.replica_id_in_sync_group % local_replicas
    return tf.distribute.ReplicaContext(strategy, number)
