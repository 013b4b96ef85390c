"""What the callbacks that measure flatness have in common."""

import math
import time

import keras

from keras_infomcr import validation


class MeasuringCallback(keras.callbacks.Callback):
    """Measures the model at the end of epochs, and after the last.

    Subclasses give `names` of the logs, NaN in an epoch without a measurement, and `measure`.

    Args:
        data: Tuple `(x, y)`, or what gives batches `(x, y)`.
        frequency: Integer, at least 1.
        verbose: 0 or 1.
    """

    names = ()

    def __init__(self, data, frequency, verbose):
        super().__init__()
        validation.integer(minimum=1, frequency=frequency)
        validation.one_of(0, 1, verbose=verbose)
        self.data = data
        self.frequency = frequency
        self.verbose = verbose

    def measure(self):
        """Return the logs, a dictionary with the keys `names`."""
        raise NotImplementedError

    def examples(self):
        """Return the data as `x` and `y`, which is `None` if `x` gives batches."""
        if not isinstance(self.data, tuple):
            return self.data, None
        return keras.utils.unpack_x_y_sample_weight(self.data)[:2]

    def on_train_begin(self, logs=None):
        self._measured = False
        self._num_measured = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        self._measured = last or (epoch + 1) % self.frequency == 0
        if self._measured:
            self._measure(logs, f"Epoch {epoch + 1}")
        else:
            logs.update(dict.fromkeys(self.names, math.nan))

    def on_train_end(self, logs=None):
        # A callback after this one may have stopped training.
        if not self._measured and logs:
            self._measure(logs, "End of training")

    def _measure(self, logs, when):
        start = time.perf_counter()
        epoch_seconds = start - self._epoch_start
        found = self.measure()
        logs.update(found)
        seconds = time.perf_counter() - start
        self._num_measured += 1
        if not self.verbose:
            return
        named = [name for name in self.names if not name.endswith("_stderr")]
        estimates = [
            f"{name} {found[name]:#.5g} +- {found[f'{name}_stderr']:#.3g}" for name in named
        ]
        print(f"{when}: {', '.join(estimates)} ({seconds:.1f} s)")
        if self._num_measured == 2:
            share = 100 * seconds / epoch_seconds
            print(f"{', '.join(named)} takes {share:.1f} % of an epoch's time")
