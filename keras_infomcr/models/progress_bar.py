"""The progress bar of `fit`."""

import keras

from keras_infomcr.scalars import to_float


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, which leaves the regulariser out of epochs in which it did not act.

    Args:
        monitor: A `RegularizerMonitor`.
    """

    # As Keras's own: it does not keep other callbacks from being called in the background.
    async_safe = True

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def on_epoch_end(self, epoch, logs=None):
        if not to_float(self.monitor.mean.count):
            ours = {self.monitor.key, *self.monitor.further}
            logs = {name: value for name, value in (logs or {}).items() if name not in ours}
        super().on_epoch_end(epoch, logs)
