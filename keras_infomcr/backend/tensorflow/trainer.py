"""TensorFlow: the training step.

Private methods of Keras overridden here, unchanged from 3.10 to 3.15: `_maybe_symbolic_build` and
`_make_function`. Keras's own fail with a `MultiWorkerMirroredStrategy` of several workers.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_infomcr import keras_internals
from keras_infomcr.backend.tensorflow.control_flow import batch_size
from keras_infomcr.backend.tensorflow.distribution import is_multi_worker, num_replicas
from keras_infomcr.backend.tensorflow.random import check_draws_of_eager_model
from keras_infomcr.backend.trainer import BaseTrainer


class Trainer(BaseTrainer):
    """The trainer of TensorFlow."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        _agree_on_overflow(self.optimizer)

    def _call_step(self, step: Callable, data):
        data = keras.tree.map_structure(_as_tensor, data)
        if tf.executing_eagerly():
            check_draws_of_eager_model(self, keras.utils.unpack_x_y_sample_weight(data)[0])
        return step(data)

    def _main_pass(self, x, y, sample_weight):
        kwargs = {"training": True} if keras_internals.call_has_training_arg(self) else {}
        with tf.GradientTape() as tape:
            y_pred = self(x, **kwargs)
            loss = keras_internals.compute_loss(self, x, y, y_pred, sample_weight)
            # Under a strategy Keras divides the loss by the number of replicas.
            whole = loss * num_replicas(self)
            tracker = keras_internals.loss_tracker(self)
            tracker.update_state(whole, sample_weight=batch_size(x))
            loss = self.optimizer.scale_loss(loss)
        # Only now: a model without a `build` has its variables since the pass.
        return y_pred, tape.gradient(loss, self.trainable_variables)

    def _apply_gradients(self, gradients: list) -> None:
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras would build from the mean of a batch over the workers, and fails to compute it. What
        # the first replica of this process gets is as good.
        if iterator is not None and keras_internals.distribute_strategy(self) is not None:
            data_batch = self._first_local_batch(iterator)
        return super()._maybe_symbolic_build(data_batch=data_batch)

    def _first_local_batch(self, iterator):
        local = self.distribute_strategy.experimental_local_results
        for _, _, batches in iterator:
            return keras.tree.map_structure(lambda a: local(a)[0], next(batches))

    def _make_function(self, step_function, *args, **kwargs):
        # Keras takes the mean of the logs over several workers along their first axis, which it
        # has not given them. Here, and not in `train_step`, so that a user's own step gets it too.
        if is_multi_worker(self):
            step_function = _with_leading_axis(step_function)
        return super()._make_function(step_function, *args, **kwargs)


def _with_leading_axis(step):
    return lambda data: keras.tree.map_structure(lambda a: tf.expand_dims(a, 0), step(data))


def _as_tensor(array):
    """Turn the NumPy arrays of `train_on_batch(run_eagerly=True)` into tensors."""
    composite = isinstance(array, tf.__internal__.CompositeTensor)
    return array if array is None or composite else tf.convert_to_tensor(array)


def _agree_on_overflow(optimizer):
    """Let a `LossScaleOptimizer` skip a step on all replicas if the gradients of one overflow.

    Keras checks the gradients before they are summed, and takes the verdict of the first replica
    for all: the others' infinities would reach the weights.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    check_finite = type(optimizer).check_finite

    def check_all_finite(gradients):
        finite = check_finite(optimizer, gradients)
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync == 1:
            return finite
        overflows = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
        return tf.equal(overflows, 0)

    optimizer.check_finite = check_all_finite
