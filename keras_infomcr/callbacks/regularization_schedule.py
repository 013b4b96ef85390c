"""A schedule of the regulariser's strength, or of another live hyper-parameter."""

from collections.abc import Callable

import keras

from keras_infomcr import validation
from keras_infomcr.callbacks.regularized_model_callback import RegularizedModelCallback
from keras_infomcr.scalars import to_float


class RegularizationSchedule(RegularizedModelCallback):
    """Set the strength of the regulariser, or another live hyper-parameter, by epoch or by step.

    InfoMCR keeps beta fixed and names its adaptation as future work. Here nothing is re-traced.

    Args:
        schedule: Function of the epoch (an integer from 0) that returns the strength of that
            epoch, or a `keras.optimizers.schedules.LearningRateSchedule`, whose value at the
            optimizer's step count becomes the strength of that step. The strength is a float,
            0 or greater.
        parameter: String, the name of the live hyper-parameter that is set: `"strength"`, which
            `SubBatchPerturbation` also calls `"beta"` and `WeightNoise` `"std"`, or another one of
            the rule, such as the radius `"rho"`. Defaults to `"strength"`.
        verbose: 0 or 1. With 1, a line is printed for each epoch. Defaults to 0.

    Raises:
        TypeError: If `schedule` is not callable.
        ValueError: In `fit`, if the model has no regulariser, the regulariser no such live
            hyper-parameter, or a value is out of range.

    Example:

    ```python
    RegularizationSchedule(lambda epoch: 10.0 if epoch < 60 else 40.0)
    RegularizationSchedule(keras.optimizers.schedules.CosineDecay(40.0, decay_steps=10_000))
    ```

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Section 8 (https://arxiv.org/abs/1911.08192).
    """

    def __init__(
        self,
        schedule: Callable[[int], float] | keras.optimizers.schedules.LearningRateSchedule,
        parameter: str = "strength",
        verbose: int = 0,
    ):
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                "`schedule` must be a function of the epoch or a `LearningRateSchedule`. "
                f"Received: schedule={schedule!r} (of type {type(schedule)})"
            )
        validation.one_of(0, 1, verbose=verbose)
        self.schedule = schedule
        self.parameter = parameter
        self.verbose = verbose
        self._by_step = isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)

    def on_train_begin(self, logs=None):
        rule = self.model.regularizer
        names = _live_names(rule)
        if self.parameter not in names:
            raise ValueError(
                "`parameter` must be a live hyper-parameter of the regulariser. Received: "
                f"parameter={self.parameter!r} and {type(rule).__name__}, which has {names}."
            )

    def on_epoch_begin(self, epoch, logs=None):
        if self._by_step:
            self._set_by_step()
        else:
            self._set(self.schedule(epoch))
        if self.verbose:
            value = to_float(getattr(self.model.regularizer, self.parameter))
            print(f"Epoch {epoch + 1}: {self.parameter} of the regulariser is {value:g}.")

    def on_train_batch_begin(self, batch, logs=None):
        if self._by_step:
            self._set_by_step()

    def _set_by_step(self):
        self._set(self.schedule(self.model.optimizer.iterations))

    def _set(self, value):
        setattr(self.model.regularizer, self.parameter, value)


def _live_names(rule) -> list[str]:
    names = (n for n in dir(type(rule)) if not n.startswith("_"))
    return [n for n in names if isinstance(getattr(rule, n), keras.Variable)]
