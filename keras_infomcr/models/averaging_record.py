"""The mean of a model's weights during training, kept in its files."""

import warnings
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr.keras_internals import all_layers
from keras_infomcr.models.learning_rate_peak import LearningRatePeak, steps_taken

# The name of the attribute of the model, past Keras's tracking: saved with the weights, yet no
# weight and no metric.
AVERAGING_RECORD = "_averaging_record"


class AveragingRecord(keras.metrics.Metric):
    """Keeps the mean of the weights of a run, and the training weights while the mean is in place.

    A file holds the weights that the model holds, and here the others: so whatever is saved when,
    the run can be resumed from it, and a model without a record loads it as any file of weights.
    Arrays are NumPy's, in float32 at least.

    It is a metric because Keras saves metrics as children of the model, whatever file it writes. It
    has no variables, and the model does not track it.

    Args:
        model: A `keras.Model`.

    Attributes:
        count: Integer, how many weights the mean is of.
        start_epoch: Integer, the epoch in which averaging has started, or `None`.
        steps: Integer, the steps since weights were last taken into the mean.
        peak: The `LearningRatePeak` of the run.
    """

    def __init__(self, model: keras.Model):
        super().__init__(name="averaging_record")
        self._model = weakref.ref(model)
        self._optimizer = weakref.ref(model.optimizer)
        self.peak = LearningRatePeak(model)
        self.forget_mean()

    def forget_mean(self):
        """Begin a new mean, and leave the model as it is."""
        self.count, self.start_epoch, self.steps = 0, None, 0
        self._mean, self._training = None, None
        self._loaded_at = None

    def belongs_to_run(self) -> bool:
        """Return whether the model is compiled as it was when the record was made."""
        return self._optimizer() is self._model().optimizer

    def resume(self):
        """Make sure, once the state of a run has been loaded, that it fits the model."""
        loaded_at, self._loaded_at = self._loaded_at, None
        if loaded_at is None:
            return
        variables = averaged_variables(self._model())
        arrays = (self._training or self._mean or []) if self.count else variables
        shapes = [tuple(a.shape) for a in arrays], [tuple(v.shape) for v in variables]
        if loaded_at != steps_taken(self._model()):
            self.forget_mean()  # the file of another run, or a model that has trained on since
        elif shapes[0] != shapes[1]:
            self.forget_mean()
            warnings.warn(
                "The file holds a mean of other weights, which begins anew. Received: shapes "
                f"{shapes[0]} for {shapes[1]}. Freeze the layers that were frozen when it was "
                "saved to resume its run.",
                stacklevel=2,
            )
        elif self.count and self._mean is None:
            self._mean = _values(variables)

    def take(self) -> bool:
        """Take the model's weights into the mean; return whether they were finite."""
        values = _values(averaged_variables(self._model()))
        if not all(np.isfinite(a).all() for a in values):
            return False
        self.count += 1
        if self.count == 1:
            self._mean = values
        for mean, value in zip(self._mean, values):
            mean += (value - mean) / self.count
        return True

    def put_mean_in_place(self):
        """Assign the mean to the model; the training weights are kept."""
        variables = averaged_variables(self._model())
        if self._training is None:
            self._training = _values(variables)
        _assign(variables, self._mean)

    def put_training_weights_in_place(self):
        """Assign the training weights to the model, if the mean is in place."""
        if self._training is not None:
            _assign(averaged_variables(self._model()), self._training)
            self._training = None

    def note(self, noted: list[keras.Variable]):
        """Let the mean of some variables be what the model holds."""
        ids = {id(v) for v in noted}
        for mean, variable in zip(self._mean, averaged_variables(self._model())):
            if id(variable) in ids:
                mean[...] = _value(variable)

    def save_own_variables(self, store):
        self.peak.save(store)
        if self.start_epoch is not None:
            store["start_epoch"], store["steps"] = self.start_epoch, self.steps
            store["count"], store["saved_at"] = self.count, steps_taken(self._model())
        if not self.count:
            return
        variables = averaged_variables(self._model())
        exact = all(v.dtype in ("float32", "float64") for v in variables)
        if self._training is None or not exact:  # else the mean stands as the weights
            _save(store, "mean", self._mean)
        if self._training is not None:
            _save(store, "training", self._training)

    def load_own_variables(self, store):
        self.forget_mean()
        self.peak.reset()
        self.peak.load(store)
        if "start_epoch" in store.keys():
            names = "start_epoch", "steps", "count", "saved_at"
            values = (int(store[name][()]) for name in names)
            self.start_epoch, self.steps, self.count, self._loaded_at = values
            self._mean, self._training = _load(store, "mean"), _load(store, "training")


def averaging_record(model: keras.Model) -> AveragingRecord:
    """Return the record of any compiled model, made for it if need be."""
    record = model.__dict__.get(AVERAGING_RECORD)
    if record is None or not record.belongs_to_run():
        record = AveragingRecord(model)
        object.__setattr__(model, AVERAGING_RECORD, record)
    return record


def averaged_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the trainable weights and the floating-point state of layers that are not frozen."""
    frozen = {id(v) for x in all_layers(model) if not x.trainable for v in x.variables}
    state = [v for v in model.non_trainable_variables if id(v) not in frozen]
    return [v for v in [*model.trainable_variables, *state] if "float" in v.dtype]


def _values(variables: list[keras.Variable]) -> list[np.ndarray]:
    return [_value(v) for v in variables]


def _value(variable: keras.Variable) -> np.ndarray:
    wide = "float64" if variable.dtype == "float64" else "float32"
    # Copied twice: a variable of a strategy must be read, and torch lends NumPy its memory.
    return np.array(ops.convert_to_numpy(ops.copy(variable)), wide)


def _assign(variables: list[keras.Variable], values: list[np.ndarray]):
    for variable, value in zip(variables, values):
        variable.assign(ops.convert_to_tensor(value, dtype=variable.dtype))


def _save(store: Any, name: str, arrays: list[np.ndarray]):
    for k, array in enumerate(arrays):
        store[f"{name}_{k}"] = array


def _load(store: Any, name: str) -> list[np.ndarray] | None:
    count = sum(key.startswith(f"{name}_") for key in store.keys())
    return [np.array(store[f"{name}_{k}"]) for k in range(count)] or None
