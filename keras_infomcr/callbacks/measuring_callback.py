"""What the callbacks that measure flatness have in common."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.callbacks.callbacks_of_fit import callbacks_of_fit
from keras_infomcr.flatness.running.checks import warn

# Callbacks of Keras that read all logs.
_READERS = (
    keras.callbacks.CSVLogger,
    keras.callbacks.History,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)

# The ends of keys that are logged beside an estimate and not printed as one.
_BESIDE = "_stderr", "_log_loss_part"


class MeasuringCallback(keras.callbacks.Callback):
    """Measures the model at the end of epochs, and after the last.

    Subclasses define `measure`, and `names`, the keys that it logs; in an epoch without a
    measurement they are NaN. A subclass that measures at other times too overrides `is_due` and
    `logs_without_measurement`.

    Args:
        data: Tuple `(x, y)`, or what gives batches `(x, y)`.
        frequency: Integer, at least 1.
        verbose: 0 or 1.
    """

    names = ()
    _examples = None

    def __init__(self, data: Any, frequency: int, verbose: int):
        super().__init__()
        validation.integer(minimum=1, frequency=frequency)
        validation.one_of(0, 1, verbose=verbose)
        self.data = data
        self.frequency = frequency
        self.verbose = verbose

    def measure(self) -> dict[str, float]:
        """Return the logs, a dictionary with the keys `names`."""
        raise NotImplementedError

    def examples(self) -> tuple:
        """Return the data, as the model sees them: `x` and `y`, `None` if `x` gives batches."""
        if self._examples is None:
            # KerasHub's models preprocess what `fit` is given by a method of this name.
            preprocess = getattr(self.model, "preprocess_samples", _as_they_are)
            if isinstance(self.data, tuple):
                self._examples = _preprocessed(self.data, preprocess)[:2]
            elif preprocess is _as_they_are:
                self._examples = self.data, None
            else:
                self._examples = _PreprocessedBatches(self.data, preprocess), None
        return self._examples

    def on_train_begin(self, logs=None):
        self._measured = False
        self._num_measured = 0
        self._examples = None
        self._warn_of_readers()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        self._measured = last or self.is_due(epoch)
        if self._measured:
            self._measure(logs, f"Epoch {epoch + 1}")
        else:
            logs.update(self.logs_without_measurement())

    def is_due(self, epoch: int) -> bool:
        """Return whether to measure at the end of an epoch, counted from 0."""
        return (epoch + 1) % self.frequency == 0

    def logs_without_measurement(self) -> dict[str, float]:
        """Return the logs of an epoch that ends without a measurement."""
        return dict.fromkeys(self.names, math.nan)

    def on_train_end(self, logs=None):
        # A callback after this one may have stopped training.
        if not self._measured and logs:
            self._measure(logs, "End of training")
        self._examples = None

    def _warn_of_readers(self):
        """Warn of callbacks that read the logs before this one has written into them."""
        callbacks = callbacks_of_fit(self) or []
        before = callbacks[: next((i for i, c in enumerate(callbacks) if c is self), 0)]
        blind = [
            type(c).__name__
            for c in before
            if isinstance(c, _READERS) or getattr(c, "monitor", None) in self.names
        ]
        if blind:
            ours = type(self).__name__
            warn(
                f"`{ours}` must stand before the callbacks that read what it logs. Received: "
                f"callbacks={[type(c).__name__ for c in callbacks]}, in which {blind} will not "
                f"see {list(self.names)}. Put `{ours}` first."
            )

    def _measure(self, logs: dict, when: str, after_epoch: bool = True):
        start = time.perf_counter()
        epoch_seconds = start - self._epoch_start
        found = self.measure()
        logs.update(found)
        seconds = time.perf_counter() - start
        self._num_measured += 1
        if not self.verbose:
            return
        named = [name for name in self.names if not name.endswith(_BESIDE)]
        errors = {n: f" +- {found[e]:#.3g}" for n in named if (e := f"{n}_stderr") in found}
        estimates = [f"{name} {found[name]:#.5g}{errors.get(name, '')}" for name in named]
        print(f"{when}: {', '.join(estimates)} ({seconds:.1f} s)")
        # The first measurement compiles; its time would say nothing of the others.
        if self._num_measured == 2 and after_epoch:
            share = 100 * seconds / epoch_seconds
            print(f"{', '.join(named)} takes {share:.1f} % of an epoch's time")


def check_one_tuple(data: Any, second: Any):
    """Refuse labels that were given as an argument of their own."""
    if len(getattr(second, "shape", ())):
        raise ValueError(
            "`data` must be one tuple `(x, y)`. "
            f"Received: data of type {type(data)}, and then an array of type {type(second)}. "
            "Put parentheses around the two."
        )


class _PreprocessedBatches:
    """Batches as the model sees them, preprocessed anew by each iteration."""

    def __init__(self, batches: Any, preprocess: Callable):
        self._batches = batches
        self._preprocess = preprocess

    def __iter__(self) -> Iterator[tuple]:
        batches = self._batches
        if isinstance(batches, keras.utils.PyDataset):
            batches = map(batches.__getitem__, range(batches.num_batches))
        for batch in batches:
            yield _preprocessed(batch, self._preprocess)


def _preprocessed(data: Any, preprocess: Callable) -> tuple:
    return keras.utils.unpack_x_y_sample_weight(
        preprocess(*keras.utils.unpack_x_y_sample_weight(data))
    )


def _as_they_are(*data):
    return data
