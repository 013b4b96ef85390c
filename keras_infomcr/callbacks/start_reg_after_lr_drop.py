"""The gate of the regulariser, opened by the first drop of the learning rate."""

import warnings

import keras

from keras_infomcr import validation
from keras_infomcr.callbacks.callbacks_of_fit import callbacks_of_fit
from keras_infomcr.callbacks.gate_callback import GateCallback
from keras_infomcr.models.regularized_model import RegularizedModel
from keras_infomcr.models.training_record import training_record
from keras_infomcr.scalars import to_float

# Callbacks of Keras that may change the learning rate.
_STEERING = {
    keras.callbacks.Callback,  # with hooks put on the instance
    keras.callbacks.LambdaCallback,
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
}


class StartRegAfterLRDrop(GateCallback):
    """Start the regulariser after the first drop of the learning rate.

    The gate `model.regularizer_active` is closed when training begins and opened before the
    first batch whose learning rate is below `ratio` times the highest that a batch has used. So
    it follows schedule objects, `ReduceLROnPlateau`, `LearningRateScheduler` and any other way
    to change the rate, in any order of callbacks; a rise (warm-up) is no drop. (A callback that
    changes the rate in `on_train_batch_begin` must stand before this one.) A run resumed by
    `BackupAndRestore` or from a `.keras` file remembers its highest rate. Where nothing can
    lower the rate, a warning says at the first batch that the gate will stay closed.

    The paper's reason: "In the beginning stage where the optimization process is not stable, our
    regularizer can result in great numerical errors."

    Args:
        ratio: Float in (0, 1]. A rate below `ratio` times the peak is a drop. Defaults to 0.75,
            which the usual steps, to a half and less, fall below at once, and smooth decays
            in mid-training as the paper's first step does, after 0.3 of its epochs: a cosine
            after 1/3 of its course, a straight line after 1/4, steps of 0.9 at the third.
        start_epoch: Integer from 0, or `None`. The epoch at which the gate opens even if the
            rate has not dropped. Defaults to `None`: never.
        verbose: 0 or 1. With 1, a line is printed when the gate opens, with the reason.
            Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range, or, in `fit`, if the model has no
            regulariser.

    Example:

    ```python
    model.fit(x, y, callbacks=[keras.callbacks.ReduceLROnPlateau("loss"), StartRegAfterLRDrop()])
    ```

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Section 7.2.1 (https://arxiv.org/abs/1911.08192).
    """

    def __init__(self, ratio: float = 0.75, start_epoch: int | None = None, verbose: int = 0):
        super().__init__(verbose)
        validation.fraction(ratio=ratio)
        if start_epoch is not None:
            validation.integer(minimum=0, start_epoch=start_epoch)
        self.ratio = ratio
        self.start_epoch = start_epoch

    def on_train_begin(self, logs=None):
        super().on_train_begin()
        self._recalled = False
        self._callbacks = callbacks_of_fit(self)

    def on_train_batch_begin(self, batch, logs=None):
        # Reading the rate waits for the step before, so it ends once the gate is open.
        if self._gated_model.regularizer_active:
            return
        first = not self._recalled
        if first:
            self._recall()
        rate = to_float(self.model.optimizer.learning_rate)
        peak = training_record(self.model).update_peak(rate)
        dropped = rate < self.ratio * peak
        if dropped:
            self._open(
                f"Learning rate {rate:g}: it has fallen below {self.ratio:g} of its peak {peak:g}."
            )
        elif self.start_epoch is not None and self._epoch >= self.start_epoch:
            self._open(
                f"Learning rate {rate:g}: start_epoch={self.start_epoch} has come, its peak is "
                f"{peak:g}."
            )
        elif first and self._stays_closed():
            self._warn(
                "will never start in this `fit`: the learning rate is constant, and no callback "
                "changes it, so it will not drop below `ratio` times its peak"
            )

    def _stays_closed(self):
        """Return whether it is known that nothing opens the gate in this `fit`."""
        optimizer = self.model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        return (
            (self.start_epoch is None or self.start_epoch >= self.params["epochs"])
            and all(_is_known(o) for o in (optimizer, inner))
            and isinstance(getattr(inner, "_learning_rate", None), keras.Variable)
            and type(self.model).train_step is RegularizedModel.train_step
            and self._callbacks is not None
            and all(_is_known(c) and type(c) not in _STEERING for c in self._callbacks)
        )

    def _warn(self, what):
        warnings.warn(
            f"The regulariser {what}. Received: ratio={self.ratio}, "
            f"start_epoch={self.start_epoch}. Lower the learning rate during training or "
            "set `start_epoch`.",
            stacklevel=3,
        )

    def _warn_of_no_start(self):
        self._warn("never started: the learning rate did not drop below `ratio` times its peak")

    def _recall(self):
        """Take in the rates of the steps before this call of `fit`, where they can be known."""
        self._recalled = True
        training_record(self.model).peak.update_by_schedule()


def _is_known(thing):
    """Return whether the class of an object is Keras's or one of ours."""
    return type(thing).__module__.startswith(("keras.", "keras_infomcr."))
