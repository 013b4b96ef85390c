"""What a regularised model keeps in its files beside its weights."""

import warnings
import weakref

import keras
import numpy as np

from keras_infomcr.models.learning_rate_peak import LearningRatePeak


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
        self.peak = LearningRatePeak(model)
        self.reset()

    def reset(self):
        """Forget the run, and what a file has held of the memory."""
        self.peak.reset()
        self._rule, self._memory = None, []

    def recall_peak(self) -> float | None:
        """Return the peak of the run that the model is in, `None` if unknown."""
        return self.peak.recall()

    def update_peak(self, rate: float) -> float:
        """Take in a learning rate that a batch uses; return the peak."""
        return self.peak.update(rate)

    def restore_memory(self):
        """Assign what a file has held to the memory of the regulariser, once it has been made."""
        regularizer = self._model().regularizer
        variables = regularizer.memory if regularizer else ()
        if not self._memory or not variables:
            return
        saved, self._memory = self._memory, []
        shapes = [v.shape for v in saved], [tuple(v.shape) for v in variables]
        name = _name_of(regularizer)
        if self._rule != name or shapes[0] != shapes[1]:
            warnings.warn(
                "The file holds the memory of another regulariser, which begins anew. Received: a "
                f"memory of {self._rule!r} with shapes {shapes[0]} for {name!r} with shapes "
                f"{shapes[1]}. Compile the model as it was saved to resume its run.",
                stacklevel=2,
            )
            return
        for variable, value in zip(variables, saved):
            variable.assign(value)

    def save_own_variables(self, store):
        self.peak.save(store)
        regularizer = self._model().regularizer
        rule, memory = self._rule, self._memory  # loaded, and not given to the rule yet
        if regularizer and regularizer.memory and not memory:
            rule, memory = _name_of(regularizer), regularizer.memory
        if memory:
            store["rule"] = np.frombuffer(rule.encode(), "uint8")
        for k, array in enumerate(memory):
            store[f"memory_{k}"] = array

    def load_own_variables(self, store):
        self.peak.load(store)
        if "rule" in store.keys():
            self._rule = bytes(np.array(store["rule"], "uint8")).decode()
        count = sum(name.startswith("memory_") for name in store.keys())
        self._memory = [np.array(store[f"memory_{k}"]) for k in range(count)]
        self.restore_memory()


def _name_of(regularizer) -> str:
    return keras.saving.get_registered_name(type(regularizer))


class PeakOfOldFiles(keras.metrics.Metric):
    """Reads the peak from files that were written when it was an attribute of the model.

    Args:
        record: The `TrainingRecord` of the model.
    """

    def __init__(self, record: TrainingRecord):
        super().__init__(name="learning_rate_peak")
        self._record = weakref.ref(record)  # else Keras would save the record as a child of this

    def save_own_variables(self, store):
        """Write nothing: the record does."""

    def load_own_variables(self, store):
        if "peak" in store.keys():
            self._record().load_own_variables(store)


def training_record(model: keras.Model) -> TrainingRecord:
    """Return the record of a `RegularizedModel`."""
    return model._training_record
