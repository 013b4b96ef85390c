"""Stochastic weight averaging."""

import numbers
from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.callbacks.callbacks_of_fit import callback_list_of_fit
from keras_infomcr.flatness.loss.batch_norm_statistics import moving_statistics
from keras_infomcr.flatness.reestimate_batch_norm import inputs_of, reestimate_batch_norm
from keras_infomcr.flatness.running.checks import warn
from keras_infomcr.models.averaging_record import averaging_record
from keras_infomcr.scalars import to_float

# The default `ratio` of `StartRegAfterLRDrop`.
_RATIO = 0.75


class WeightAveraging(keras.callbacks.Callback):
    """Average the weights of the late part of training: stochastic weight averaging (SWA).

    The mean is uniform: all weights taken, at the ends of epochs or every so many steps, count
    alike. It stands in the model from the end of an epoch to the beginning of the next: for
    validation, for `ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)`, measures of
    flatness and all else that callbacks do at the end of an epoch, wherever they stand in the
    list. Training goes on from the training weights. When training ends the model holds the mean
    (or the best mean, if `EarlyStopping` restores it). Before the start all is as without this
    callback. It works with any `keras.Model`. Averaged are the trainable weights and state such as
    the statistics of batch normalisation; not integers, seeds, and the variables of frozen layers.
    The mean of statistics is not the statistics of the mean: pass data as `reestimate_with`.

    Keras's own `use_ema` and `SwapEMAWeights` keep an exponential mean in the optimizer, from the
    first step on, in which old weights fade; its validation has it only through `SwapEMAWeights`,
    which cannot be combined with this callback.

    A run that `BackupAndRestore` resumes goes on with its training weights, its mean and its
    highest learning rate. Any file written in an epoch's end holds the mean as the model's weights,
    and beside them the training weights. Weights that hold NaN or infinity are left out of the
    mean, with one warning, so that the model ends with the last finite mean.

    The mean takes the memory of one copy of the weights, and the training weights the memory of
    another while the mean is in place: on the host, in float32 at least.

    Args:
        start: Integer from 0, the epoch from which weights are averaged, or `"lr_drop"`: the epoch
            or step whose learning rate first falls below 0.75 times its peak, by which
            `StartRegAfterLRDrop` starts. Defaults to `"lr_drop"`.
        frequency: Integer, at least 1. Take the weights every so many epochs or steps, counted
            from the start. With a cyclic rate, the length of a cycle. Defaults to 1.
        unit: `"epoch"` or `"step"`, of `frequency`. Each taking copies the weights to the host.
            Defaults to `"epoch"`.
        reestimate_with: Data for the statistics of batch normalisation, as for
            `keras_infomcr.flatness.reestimate_batch_norm`: one pass over them whenever a new mean
            is put in place. `None`: the uniform mean of the moving statistics. Defaults to `None`.
        verbose: 0 or 1. With 1, a line is printed when averaging starts and when it ends.
            Defaults to 0.

    Raises:
        TypeError: When training begins, if `reestimate_with` are no data.
        ValueError: If an argument is out of its range; when training begins, if `reestimate_with`
            is empty or not finite, or another callback cannot work with this one:
            `SwapEMAWeights`, a second `WeightAveraging`, or a `ModelCheckpoint` with `save_freq`
            in batches, since the mean is in place at the ends of epochs alone.

    Example:

    ```python
    averaging = WeightAveraging(start=75, reestimate_with=x_train)
    model.fit(x_train, y_train, epochs=100, validation_data=data, callbacks=[averaging])
    ```

    Reference: Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging Weights Leads to Wider
    Optima and Better Generalization", UAI 2018 (https://arxiv.org/abs/1803.05407).
    """

    def __init__(
        self,
        start: str | int = "lr_drop",
        frequency: int = 1,
        unit: str = "epoch",
        reestimate_with: Any = None,
        verbose: int = 0,
    ):
        super().__init__()
        is_epoch = isinstance(start, numbers.Integral) and not isinstance(start, bool)
        if not (is_epoch and start >= 0) and not (isinstance(start, str) and start == "lr_drop"):
            raise ValueError(
                '`start` must be "lr_drop" or an integer of at least 0, an epoch. '
                f"Received: start={start!r}"
            )
        validation.integer(minimum=1, frequency=frequency)
        validation.one_of("epoch", "step", unit=unit)
        validation.one_of(0, 1, verbose=verbose)
        self.start = start
        self.frequency = frequency
        self.unit = unit
        self.reestimate_with = reestimate_with
        self.verbose = verbose
        # Keras asks: with epochs alone nothing is done after a batch.
        self.async_safe = unit == "epoch"
        self._training = False

    def set_model(self, model):
        super().set_model(model)
        # `self.model` makes Keras on JAX reattach the state of `fit`.
        self._averaged_model = model
        averaging_record(model)  # which `BackupAndRestore` finds when it loads a file
        self._training = False  # an earlier `fit` may have ended by an error

    def on_train_begin(self, logs=None):
        self._go_first()
        if self.reestimate_with is not None:
            next(iter(inputs_of(self.reestimate_with)))  # checks the data
        self._training = True
        self._resumed = False
        self._warned = False
        self._recalled = False
        self._reestimated_at = None  # the count of the mean that has its statistics

    def on_epoch_begin(self, epoch, logs=None):
        record = averaging_record(self.model)
        if not self._resumed:
            self._resumed = True
            record.resume()
        record.put_training_weights_in_place()
        self._epoch, self._ended = epoch, False
        self._batches = 0
        if self.start != "lr_drop" and record.start_epoch is None and epoch >= self.start:
            self._begin(f"start={self.start} has come")

    def on_train_batch_begin(self, batch, logs=None):
        # Reading the rate waits for the step before, so it ends once averaging has started.
        if self.start != "lr_drop" or self._started():
            return
        peak = averaging_record(self.model).peak
        if not self._recalled:
            self._recalled = True
            peak.update_by_schedule()
        rate = to_float(self.model.optimizer.learning_rate)
        highest = peak.update(rate)
        if rate < _RATIO * highest:
            self._begin(f"the learning rate, {rate:g}, has fallen from its peak {highest:g}")

    def on_train_batch_end(self, batch, logs=None):
        if self.unit == "epoch":
            return
        new, self._batches = batch + 1 - self._batches, batch + 1
        if not self._started():
            return
        record = averaging_record(self.model)
        record.steps += new  # several at once with `steps_per_execution`
        if record.steps >= self.frequency:
            record.steps = 0
            self._take()

    def on_test_begin(self, logs=None):
        if self._training:  # the validation, which comes before the end of an epoch
            self._end_epoch()

    def on_epoch_end(self, epoch, logs=None):
        self._end_epoch()

    def on_train_end(self, logs=None):
        self._training = False
        if not self._resumed:  # there was no epoch
            return
        record = averaging_record(self.model)
        if not record.count:
            if not self._warned:
                self._warn_of_none()
            return
        self._put_mean_in_place()  # again, since Keras has put in the optimizer's EMA, if any
        if self.verbose:
            print(f"The model holds the mean of {record.count} weights.")
        record.forget_mean()

    def _go_first(self):
        """Stand first among the callbacks, so that all others find the weights that they ought."""
        found = callback_list_of_fit(self)
        if found is None:
            return
        others = [c for c in found.callbacks if c is not self]
        for other in others:
            if _clashes(other):
                raise ValueError(
                    "`WeightAveraging` must be the only callback that puts averaged weights in "
                    "place, and `ModelCheckpoint` save at the ends of epochs, when they are. "
                    f"Received: callbacks={[type(c).__name__ for c in found.callbacks]}, with "
                    f"{type(other).__name__}(save_freq={getattr(other, 'save_freq', None)!r}). "
                    'Leave it out, or let it have `save_freq="epoch"`.'
                )
        # A new list: Keras is going through the old one.
        found.callbacks = [self, *others]

    def _started(self) -> bool:
        return averaging_record(self._averaged_model).start_epoch is not None

    def _begin(self, why: str):
        averaging_record(self.model).start_epoch = self._epoch
        if self.verbose:
            print(f"Epoch {self._epoch + 1}: averaging of weights starts: {why}.")

    def _take(self):
        if not averaging_record(self.model).take() and not self._warned:
            self._warned = True
            warn(
                "The training weights hold NaN or infinity, and are left out of their mean. "
                f"Received: such weights in epoch {self._epoch + 1}. Training has diverged: lower "
                "the learning rate, or stop by `keras.callbacks.TerminateOnNaN`."
            )

    def _end_epoch(self):
        """Take the weights if it is their turn, and put the mean in place, once in an epoch."""
        if self._ended:
            return
        self._ended = True
        record = averaging_record(self.model)
        if record.start_epoch is None:
            return
        epochs = self._epoch + 1 - record.start_epoch
        if self.unit == "epoch" and epochs % self.frequency == 0:
            self._take()
        if record.count:
            self._put_mean_in_place()

    def _put_mean_in_place(self):
        model, data = self.model, self.reestimate_with
        record = averaging_record(model)
        record.put_mean_in_place()
        if data is not None and self._reestimated_at != record.count:
            reestimate_batch_norm(model, data)
            record.note(moving_statistics(model))
            self._reestimated_at = record.count

    def _warn_of_none(self):
        why = f"no epoch from start={self.start!r} on has come to the end of a period"
        if self.start == "lr_drop" and not self._started():
            why = f"the learning rate did not drop below {_RATIO} times its peak"
        warn(
            f"No weights were averaged: {why}. Received: start={self.start!r}, "
            f"frequency={self.frequency}, unit={self.unit!r}. The model holds the training "
            "weights. Lower the learning rate during training, or let `start` be an earlier epoch."
        )


def _clashes(callback: keras.callbacks.Callback) -> bool:
    kinds = keras.callbacks.SwapEMAWeights, WeightAveraging
    in_batches = getattr(callback, "save_freq", "epoch") != "epoch"
    of_batches = isinstance(callback, keras.callbacks.ModelCheckpoint) and in_batches
    return isinstance(callback, kinds) or of_batches
