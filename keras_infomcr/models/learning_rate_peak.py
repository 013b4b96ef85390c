"""The highest learning rate of a run, remembered in the model's files."""

import weakref

import keras

from keras_infomcr.scalars import to_float


class LearningRatePeak(keras.metrics.Metric):
    """Remembers the peak of the learning rate across interruptions of a run.

    After resuming with `BackupAndRestore` or from a `.keras` file only the present, perhaps
    lowered, rate can be seen. So the peak is saved beside the weights, with the number of steps
    taken; it is believed again only if the optimizer has taken as many.

    A metric because Keras saves those as children of the model. It has no variables, and the
    model does not track it.

    Args:
        model: The model whose optimizer's steps are counted.
    """

    def __init__(self, model):
        super().__init__(name="learning_rate_peak")
        self._model = weakref.ref(model)
        self.reset()

    def reset(self):
        """Forget the run."""
        self._value = None
        self._loaded_at = None

    def recall(self):
        """Return the peak of the run that the model is in, `None` if unknown."""
        if self._loaded_at is not None and self._loaded_at != self._iterations():
            return None
        return self._value

    def update(self, rate):
        """Take in a learning rate that a batch uses; return the peak."""
        peak = self.recall()
        self._value = rate if peak is None else max(peak, rate)
        self._loaded_at = None
        return self._value

    def save_own_variables(self, store):
        if self._value is not None:
            store["peak"] = self._value
            store["iterations"] = self._iterations()

    def load_own_variables(self, store):
        if "peak" in store.keys():
            self._value = float(store["peak"][()])
            self._loaded_at = int(store["iterations"][()])

    def _iterations(self):
        return int(to_float(self._model().optimizer.iterations))
