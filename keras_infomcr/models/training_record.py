"""What a regularised model keeps in its files beside its weights."""

import weakref

import keras
import numpy as np

from keras_infomcr.scalars import to_float


class TrainingRecord(keras.metrics.Metric):
    """Keeps what a run must find again when it is resumed, and what is no weight.

    These are the memory of the regulariser, and the peak of the learning rate: after resuming
    with `BackupAndRestore` or from a `.keras` file only the present, perhaps lowered, rate can be
    seen. The peak is saved with the number of steps taken, and is believed again only if the
    optimizer has taken as many.

    It is a metric because Keras saves metrics as children of the model, whatever file it writes. It
    has no variables, and the model does not track it.

    Args:
        model: The `RegularizedModel`.
    """

    def __init__(self, model: keras.Model):
        super().__init__(name="training_record")
        self._model = weakref.ref(model)
        self._memory: list[np.ndarray] = []
        self.reset()

    def reset(self):
        """Forget the run; the memory is the regulariser's, which may go on."""
        self._peak = None
        self._loaded_at = None

    def recall_peak(self) -> float | None:
        """Return the peak of the run that the model is in, `None` if unknown."""
        if self._loaded_at is not None and self._loaded_at != self._iterations():
            return None
        return self._peak

    def update_peak(self, rate: float) -> float:
        """Take in a learning rate that a batch uses; return the peak."""
        peak = self.recall_peak()
        self._peak = rate if peak is None else max(peak, rate)
        self._loaded_at = None
        return self._peak

    def restore_memory(self):
        """Assign what a file has held to the memory of the regulariser, once it has been made."""
        regularizer = self._model().regularizer
        variables = regularizer.memory if regularizer else ()
        if not self._memory or not variables:
            return
        saved, self._memory = self._memory, []
        if [v.shape for v in saved] != [tuple(v.shape) for v in variables]:
            raise ValueError(
                "A file must hold a memory of the regulariser that the model is compiled with. "
                f"Received: arrays of shapes {[v.shape for v in saved]} for variables of shapes "
                f"{[tuple(v.shape) for v in variables]}. Compile the model with the regulariser "
                "that it was saved with."
            )
        for variable, value in zip(variables, saved):
            variable.assign(value)

    def save_own_variables(self, store):
        if self._peak is not None:
            store["peak"] = self._peak
            store["iterations"] = self._iterations()
        regularizer = self._model().regularizer
        for k, variable in enumerate(regularizer.memory if regularizer else ()):
            store[f"memory_{k}"] = variable

    def load_own_variables(self, store):
        if "peak" in store.keys():
            self._peak = float(store["peak"][()])
            self._loaded_at = int(store["iterations"][()])
        count = sum(name.startswith("memory_") for name in store.keys())
        self._memory = [np.array(store[f"memory_{k}"]) for k in range(count)]
        self.restore_memory()

    def _iterations(self):
        return int(to_float(self._model().optimizer.iterations))


def training_record(model: keras.Model) -> TrainingRecord:
    """Return the record of a `RegularizedModel`."""
    return model._training_record
