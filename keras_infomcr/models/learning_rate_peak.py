"""The highest learning rate of a run, below which a drop is seen."""

import weakref
from typing import Any

import keras
import numpy as np

from keras_infomcr.scalars import to_float


class LearningRatePeak:
    """The highest learning rate that the steps of a run have used.

    In a file it is kept with the number of steps taken, and is believed again only if the
    optimizer has taken as many: else another run has written it.

    Args:
        model: A `keras.Model`.
    """

    def __init__(self, model: keras.Model):
        self._model = weakref.ref(model)
        self.reset()

    def reset(self):
        """Forget the run."""
        self._peak = None
        self._loaded_at = None

    def recall(self) -> float | None:
        """Return the peak of the run that the model is in, `None` if unknown."""
        if self._loaded_at is not None and self._loaded_at != steps_taken(self._model()):
            return None
        return self._peak

    def update(self, rate: float) -> float:
        """Take in a learning rate that a batch uses; return the peak."""
        peak = self.recall()
        self._peak = rate if peak is None else max(peak, rate)
        self._loaded_at = None
        return self._peak

    def update_by_schedule(self):
        """Take in the rates of the steps taken so far, where a schedule tells them."""
        model = self._model()
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        schedule = getattr(optimizer, "_learning_rate", None)
        steps = steps_taken(model) * (getattr(optimizer, "gradient_accumulation_steps", None) or 1)
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule) and steps:
            # A sample will do: the rate changes little over a thousandth of the steps.
            for step in np.unique(np.linspace(0, steps - 1, 1000).astype(int)):
                self.update(to_float(schedule(step)))

    def save(self, store: Any):
        """Write the peak into a store of Keras's."""
        if self._peak is not None:
            store["peak"] = self._peak
            store["iterations"] = steps_taken(self._model())

    def load(self, store: Any):
        """Read the peak from a store of Keras's, if it is there."""
        if "peak" in store.keys():
            self._peak = float(store["peak"][()])
            self._loaded_at = int(store["iterations"][()])


def steps_taken(model: keras.Model) -> int:
    """Return how many updates the optimizer of a model has made."""
    return int(to_float(model.optimizer.iterations))
