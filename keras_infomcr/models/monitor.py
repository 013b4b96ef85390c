"""What `fit` logs of a regulariser."""

import math
import warnings

import keras
from keras import ops

from keras_infomcr.regularizers import Regularizer
from keras_infomcr.scalars import to_float


class RegularizerMonitor:
    """Keeps the means over an epoch of a regulariser's values, and of the norm of what it adds.

    Not a `keras.metrics.Metric` on the model: those are returned by `evaluate` and
    `train_on_batch`, which return what a plain `keras.Model` returns.

    Args:
        regularizer: The `Regularizer`.
        norms: Boolean, whether the norm of what it adds to the gradient is asked for, too.

    Attributes:
        key: String, the name of the value in the logs.
        awaited: Boolean, whether a step of the epoch was taken with the gate open.
    """

    def __init__(self, regularizer: Regularizer, norms: bool = False):
        self.norms = norms
        self.key = regularizer.log_key
        self.num_sub_batches = regularizer.num_sub_batches
        self.mean = keras.metrics.Mean(name=self.key)
        self.further = {name: keras.metrics.Mean(name=name) for name in regularizer.further_logs}
        self.relative_norm = keras.metrics.Mean(name=f"{self.key}_relative_norm")
        self.full_batches = keras.metrics.Sum(name="full_batches")
        self.awaited = False
        self._warned = set()

    def update(self, value, further, batch_size, num_parallel_steps):
        """Take in the values on a batch; part of the compiled training step.

        Args:
            value: Scalar array.
            further: Dictionary of scalar arrays, by the names in `further_logs`.
            batch_size: Integer or scalar array, the number of examples in the step.
            num_parallel_steps: Integer, how many such steps share the batch.
        """
        self.mean.update_state(value, sample_weight=batch_size)
        for name, mean in self.further.items():
            mean.update_state(further[name], sample_weight=batch_size)
        is_full = batch_size * num_parallel_steps >= self.num_sub_batches
        if isinstance(batch_size, int):
            is_full = 1.0 if is_full else 0.0
        self.full_batches.update_state(is_full)

    def update_norm(self, relative_norm, batch_size):
        """Take in the norm of what the rule adds, in norms of the training gradient.

        A step that a `LossScaleOptimizer` skips for its overflow does not count.
        """
        finite = ops.isfinite(relative_norm)
        value = ops.where(finite, relative_norm, 0.0)
        self.relative_norm.update_state(value, sample_weight=ops.where(finite, batch_size, 0))

    @property
    def metrics(self):
        return [self.mean, *self.further.values(), self.relative_norm, self.full_batches]

    @property
    def variables(self):
        return [v for metric in self.metrics for v in metric.variables]

    def logs(self):
        """Return what the logs of an epoch hold."""
        means = [*self.further.values(), *([self.relative_norm] if self.norms else [])]
        acted = {mean.name: to_float(mean.count) for mean in means}
        found = {m.name: to_float(m.result()) if acted[m.name] else math.nan for m in means}
        return {self.key: self.result()} | found

    def reset(self):
        """Begin an epoch."""
        self.awaited = False
        for metric in self.metrics:
            metric.reset_state()

    def result(self):
        """Return the mean since the epoch began, NaN if the regulariser never acted."""
        if not to_float(self.mean.count):
            if self.awaited:
                self._warn_once(
                    "The regulariser did not act although `regularizer_active=True`: the model "
                    "has no trainable weights, or its `train_step` did not call the one of "
                    "`RegularizedModel`. Call `super().train_step`, or compile with "
                    "`regularizer=None`."
                )
            return math.nan
        if not to_float(self.full_batches.result()):
            self._warn_once(
                "No batch held as many examples as there are sub-batches, so each example was a "
                f"sub-batch of its own. Received: num_sub_batches={self.num_sub_batches}. "
                "Use a larger batch or fewer sub-batches."
            )
        value = to_float(self.mean.result())
        if not math.isfinite(value):
            self._warn_once(
                f"The regulariser is not finite. Received: {self.key}={value}. The data hold "
                "NaN or infinity, or training has diverged: check the data, lower the learning "
                "rate or the arguments of the regulariser."
            )
        return value

    def _warn_once(self, message):
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


class LogRegularizer(keras.callbacks.Callback):
    """Write the mean of the regulariser into the logs of each epoch.

    Args:
        monitor: A `RegularizerMonitor`.
    """

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def on_epoch_begin(self, epoch, logs=None):
        self.monitor.reset()

    def on_epoch_end(self, epoch, logs=None):
        found = self.monitor.logs()
        if logs is not None:
            logs.update(found)
