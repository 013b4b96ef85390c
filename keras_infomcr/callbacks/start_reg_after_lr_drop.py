"""The gate of the regulariser, opened by the first drop of the learning rate."""

import warnings

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.callbacks.regularized_model_callback import RegularizedModelCallback
from keras_infomcr.scalars import to_float


class StartRegAfterLRDrop(RegularizedModelCallback):
    """Start the regulariser after the first drop of the learning rate.

    The gate `model.regularizer_active` is closed when training begins and opened before the
    first batch whose learning rate is below `ratio` times the highest that a batch has used. So
    it follows schedule objects, `ReduceLROnPlateau`, `LearningRateScheduler` and any other way
    to change the rate, in any order of callbacks; a rise (warm-up) is no drop. (A callback that
    changes the rate in `on_train_batch_begin` must stand before this one.) A run resumed by
    `BackupAndRestore` or from a `.keras` file remembers its highest rate.

    The paper's reason: "in the beginning our regularizer can result in great numerical errors".

    Args:
        ratio: Float in (0, 1]. A rate below `ratio` times the peak is a drop. Defaults to 0.99.
        start_epoch: Integer from 0, or `None`. The epoch at which the gate opens even if the
            rate has not dropped. Defaults to `None`: never.
        verbose: 0 or 1. With 1, a line is printed when the gate opens. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range, or, in `fit`, if the model has no
            regulariser.

    Example:

    ```python
    model.fit(x, y, callbacks=[keras.callbacks.ReduceLROnPlateau("loss"), StartRegAfterLRDrop()])
    ```

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Section 6 (https://arxiv.org/abs/1911.08192).
    """

    def __init__(self, ratio: float = 0.99, start_epoch: int | None = None, verbose: int = 0):
        super().__init__()
        validation.fraction(ratio=ratio)
        if start_epoch is not None:
            validation.integer(minimum=0, start_epoch=start_epoch)
        validation.one_of(0, 1, verbose=verbose)
        self.ratio = ratio
        self.start_epoch = start_epoch
        self.verbose = verbose

    def on_train_begin(self, logs=None):
        self._gate_before = self.model.regularizer_active
        self.model.regularizer_active = False
        self._epoch = None
        self._recalled = False

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        # Reading the rate waits for the step before, so it ends once the gate is open.
        if self._gated_model.regularizer_active:
            return
        if not self._recalled:
            self._recall()
        rate = to_float(self.model.optimizer.learning_rate)
        peak = self.model.learning_rate_peak.update(rate)
        due = self.start_epoch is not None and self._epoch >= self.start_epoch
        if due or rate < self.ratio * peak:
            self.model.regularizer_active = True
            if self.verbose:
                print(
                    f"Epoch {self._epoch + 1}: the regulariser starts. "
                    f"Learning rate {rate:g}, highest before {peak:g}."
                )

    def on_train_end(self, logs=None):
        if not self._recalled:  # there was no batch to train on
            self.model.regularizer_active = self._gate_before
        elif not self.model.regularizer_active:
            warnings.warn(
                "The regulariser never started: the learning rate did not drop below "
                f"`ratio` times its peak. Received: ratio={self.ratio}, "
                f"start_epoch={self.start_epoch}. Lower the learning rate during training or "
                "set `start_epoch`.",
                stacklevel=2,
            )

    def _recall(self):
        """Take in the rates of the steps before this call of `fit`, where they can be known."""
        self._recalled = True
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        schedule = getattr(optimizer, "_learning_rate", None)
        steps = int(to_float(self.model.optimizer.iterations))
        steps *= getattr(optimizer, "gradient_accumulation_steps", None) or 1
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule) and steps:
            # A sample will do: the rate changes little over a thousandth of the steps.
            for step in np.unique(np.linspace(0, steps - 1, 1000).astype(int)):
                self.model.learning_rate_peak.update(to_float(schedule(step)))
