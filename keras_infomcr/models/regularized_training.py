"""How a `RegularizedModel` is compiled and trained."""

from typing import Any

import keras

from keras_infomcr import backend, labels, objective, regularizers, validation
from keras_infomcr.models.monitor import LogRegularizer, RegularizerMonitor
from keras_infomcr.models.progress_bar import ProgressBar
from keras_infomcr.models.train_step import refuse_stateful_layers, train_step
from keras_infomcr.models.training_record import PeakOfOldFiles, TrainingRecord


class RegularizedTraining(backend.Trainer):
    """The trainer of a `RegularizedModel`, which derives from it ahead of `keras.Model`.

    It differs from Keras's in one argument of `compile`, in the training step and in its logs.

    Attributes:
        regularizer: The `Regularizer` given to `compile`, or `None`.
        regularizer_active: Boolean, the gate.
    """

    _regularizer = None
    _regularizer_active = True
    _monitor = None
    # The `id`s of the weights that the regulariser was built for.
    _built_for = None
    # The list that the regulariser has made then: another model may make another one.
    _memory = None
    # The compiled step of the other position of the gate, so that flipping back costs nothing.
    _other_train_function = None

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls, *args, **kwargs)
        # Past Keras's tracking: saved with the weights, yet no weight and no metric.
        record = TrainingRecord(model)
        object.__setattr__(model, "_training_record", record)
        object.__setattr__(model, "learning_rate_peak", PeakOfOldFiles(record))
        return model

    def compile(
        self,
        *args,
        regularizer="sub_batch_perturbation",
        log_regularizer_norm=False,
        **kwargs,
    ):
        """Configure the model for training.

        Args:
            *args: As for `keras.Model.compile`.
            regularizer: A `keras_infomcr.regularizers.Regularizer`, its name, or `None` for plain
                Keras. Defaults to `"sub_batch_perturbation"`: `SubBatchPerturbation()`.
            log_regularizer_norm: Boolean, whether the logs of `fit` also hold the norm of what the
                regulariser adds to the training gradient, relative to the norm of that gradient:
                under `<name of its value>_relative_norm`, the mean over the steps of the epoch, NaN
                while the gate is closed. It costs a pass over the weights. Defaults to `False`.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            ValueError: If `regularizer` is none of these, or the model has no layers.
        """
        if type(self).call is keras.Model.call:  # Keras's own raises an error when it is called
            raise ValueError(
                "The model must have layers. Received: a `RegularizedModel` without inputs and "
                "outputs. Make it by `RegularizedModel(inputs, outputs)`, by "
                "`RegularizedModel.from_model(model)`, or as a subclass with `call`."
            )
        regularizer = regularizers.get(regularizer)
        validation.boolean(log_regularizer_norm=log_regularizer_norm)
        super().compile(*args, **kwargs)
        if regularizer is not None:
            regularizer.check(self)
            self._monitor = RegularizerMonitor(regularizer, bool(log_regularizer_norm))
        self._regularizer = regularizer
        self._built_for = None
        self._other_train_function = None
        self._training_record.reset()

    def build_regularizer(self) -> bool:
        """Let the regulariser make its memory for the weights, once they are known.

        Returns:
            Whether it was built just now.
        """
        rule, variables = self._regularizer, self.trainable_variables
        if rule is None:
            return False
        if self._built_for == [id(v) for v in variables]:
            self._check_memory_is_ours()
            return False
        refuse_stateful_layers(self)
        with backend.variables_of(self):
            rule.build(variables)
        self._built_for = [id(v) for v in variables]
        object.__setattr__(self, "_memory", rule.memory)  # past Keras's tracking: no weights
        self._training_record.restore_memory()
        return True

    def _check_memory_is_ours(self):
        if self._memory is not self._regularizer.memory:
            raise ValueError(
                "A regulariser that keeps a memory must belong to one model. Received: "
                f"an instance of {type(self._regularizer).__name__} that another model has been "
                "trained with since. Compile each model with an instance of its own."
            )

    @property
    def regularizer(self) -> regularizers.Regularizer | None:
        # Its coefficient may be about to be read or assigned, in the middle of an epoch too.
        self._sync_variables()
        return self._regularizer

    @regularizer.setter
    def regularizer(self, value):
        raise ValueError(
            "The attribute `regularizer` of a `RegularizedModel` is taken. "
            f"Received: regularizer={value!r}. A regulariser is passed to `compile`; give an "
            "attribute of yours another name."
        )

    @property
    def regularizer_active(self) -> bool:
        return self._regularizer_active

    @regularizer_active.setter
    def regularizer_active(self, active: bool):
        validation.boolean(regularizer_active=active)
        if active == self._regularizer_active:
            return
        self._sync_variables()
        self._regularizer_active = bool(active)
        before = self.train_function
        self.train_function = self._other_train_function
        self._other_train_function = before
        if before is not None:
            self.make_train_function()

    def make_train_function(self, force=False):
        if force:  # as Keras is asked to do when what was compiled is out of date
            self._other_train_function = None
        if self.built and self.build_regularizer() and self._regularizer.memory:
            force, self._other_train_function = True, None  # what is compiled has an old memory
        before = self.train_function
        super().make_train_function(force)
        if self.train_function is not before:
            self.train_function = self._awaiting(self.train_function)
        return self.train_function

    def _awaiting(self, train_function):
        """Let the monitor know that a step is due, to warn if a user's own step skips it."""

        def function(*args):
            if self._regularizer is not None and self.regularizer_active:
                self._monitor.awaited = True
            return train_function(*args)

        return function

    def train_step(self, *args):
        if not self._acts_on(args[-1]):
            return super().train_step(*args)

        def step(data):
            evaluated = objective.Objective(self, self._regularizer.float32)
            return train_step(evaluated, self._regularizer, self._monitor, data)

        return self._call_step(step, *args)

    def _acts_on(self, data) -> bool:
        """Return whether the step on a batch is regularised; else it is Keras's own to the bit."""
        if self._regularizer is None or not self.regularizer_active:
            return False
        if self.built and not self.trainable_variables:
            return False
        # Keras's own step knows what to do with an empty batch, as a replica may get one.
        size = backend.batch_size(data)
        return not isinstance(size, int) or size > 0

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        *args,
        **kwargs,
    ):
        """Train the model, as `keras.Model.fit`, with the regulariser's value in the logs.

        Raises:
            ValueError: Also if `y` is an array that holds labels of no class of a sparse
                categorical cross-entropy.
        """
        if self._regularizer is not None:
            # A sample weight of 0 may leave an example out, and an own step may change the labels.
            if kwargs.get("sample_weight") is None and (
                type(self).train_step is RegularizedTraining.train_step
            ):
                labels.check_labels(self, y)
            callbacks = _with_log(callbacks, LogRegularizer(self._monitor), verbose)
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)

    def _variables_in_step(self) -> list[keras.Variable]:
        # In the order in which a compiled step gets them: it must not change while `fit` runs.
        if self._regularizer is None:
            return []
        rule = self._regularizer
        return [*self._monitor.variables, *rule.live_variables, *rule.memory]

    def get_compile_config(self):
        config = super().get_compile_config()
        if config.get("optimizer"):
            # Inside the optimizer's entry, where Keras ignores it: `keras.models.clone_model`
            # hands this to plain models too, whose `compile` would refuse another argument.
            config["optimizer"]["keras_infomcr"] = {
                "log_regularizer_norm": self._regularizer is not None and self._monitor.norms,
                "regularizer": keras.saving.serialize_keras_object(self._regularizer),
                "regularizer_active": self.regularizer_active,
            }
        return config

    def compile_from_config(self, config):
        # Overridden since Keras does not compile a loaded model whose `compile` is not its own.
        if type(self).compile is not RegularizedTraining.compile:
            return super().compile_from_config(config)  # Keras's warning: compile is custom
        config = dict(config)
        ours = (config.get("optimizer") or {}).get("keras_infomcr", {})
        if ours:
            config["optimizer"] = {
                k: v for k, v in config["optimizer"].items() if k != "keras_infomcr"
            }
        config = keras.saving.deserialize_keras_object(config)
        names = ("regularizer", "log_regularizer_norm")
        self.compile(**config, **{name: ours[name] for name in names if name in ours})
        self.regularizer_active = ours.get("regularizer_active", True)
        # So that its state can be loaded next.
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)


def _with_log(callbacks: Any, log: LogRegularizer, verbose: Any) -> Any:
    """Put a callback before the user's, which see what it writes, and a progress bar after them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        # A list that a user has made is used as it is, again and again: it may have our callback
        # from a `fit` before.
        log.set_params(callbacks.params)
        log.set_model(callbacks.model)
        callbacks.callbacks[:] = [
            log, *(x for x in callbacks.callbacks if not isinstance(x, LogRegularizer))
        ]  # fmt: skip
        return callbacks
    callbacks = keras.tree.flatten(callbacks or [])
    has_bar = any(isinstance(x, keras.callbacks.ProgbarLogger) for x in callbacks)
    bar = [ProgressBar(log.monitor)] if verbose != 0 and not has_bar else []
    return [log, *callbacks, *bar]
