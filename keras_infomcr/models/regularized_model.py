"""A `keras.Model` whose training step is regularised.

Private names of Keras overridden here, unchanged from 3.10 to 3.15: `_make_function` and
`_maybe_symbolic_build`, without which `MultiWorkerMirroredStrategy` fails.
"""

import keras
from keras.src.models.functional import Functional  # not exported; stands here since Keras 3.0

from keras_infomcr import backend, labels, objective, regularizers, validation
from keras_infomcr.models.file_of_chief import file_of_chief
from keras_infomcr.models.monitor import LogRegularizer, RegularizerMonitor
from keras_infomcr.models.progress_bar import ProgressBar
from keras_infomcr.models.train_step import refuse_stateful_layers, train_step
from keras_infomcr.models.training_record import TrainingRecord


@keras.saving.register_keras_serializable("keras_infomcr")
class RegularizedModel(keras.Model):
    """A `keras.Model` that trains towards flat minima.

    Made in every way a `keras.Model` is made: `RegularizedModel(inputs, outputs)`, a subclass
    with `call()`, a subclass that calls `super().__init__(inputs=..., outputs=...)`; or
    `RegularizedModel.from_model(model)`. It differs in its training step alone, and in one
    argument of `compile`. In the logs of `fit`, `infomcr_reg` is the value of the regulariser, the
    mean over the epoch, NaN while the gate was closed (the progress bar leaves it out then).

    Attributes:
        regularizer: The `keras_infomcr.regularizers.Regularizer` given to `compile`, or `None`.
            Its coefficient is live: see `Regularizer.strength`.
        regularizer_active: Boolean, the gate. Assigned at any time, also by a callback in `fit`,
            it takes effect with the next batch. While `False` the step is Keras's own.
            Defaults to `True`.

    Example:

    ```python
    inputs = keras.Input((64,))
    outputs = keras.layers.Dense(10)(keras.layers.Dense(32, "gelu")(inputs))
    model = RegularizedModel(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    ```

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020 (https://arxiv.org/abs/1911.08192).
    """

    _regularizer = None
    _regularizer_active = True
    _monitor = None
    # The `id`s of the weights that the regulariser was built for.
    _built_for = None
    # The compiled step of the other position of the gate, so that flipping back costs nothing.
    _other_train_function = None

    def __new__(cls, *args, **kwargs):
        if cls is RegularizedModel and _is_functional(args, kwargs):
            cls = RegularizedFunctional
        model = super().__new__(cls, *args, **kwargs)
        # Past Keras's tracking: saved with the weights, yet no weight and no metric.
        object.__setattr__(model, "_training_record", TrainingRecord(model))
        return model

    def __init__(self, *args, **kwargs):  # Keras looks for just these two names
        if _is_functional(args, kwargs):
            if not isinstance(self, Functional):
                _make_functional(type(self))
        elif len(args) == 1 and isinstance(args[0], (keras.Layer, list, tuple)):
            raise TypeError(
                "A `RegularizedModel` is made of inputs and outputs. "
                f"Received: {args[0]!r} (of type {type(args[0])}). Call "
                "`RegularizedModel.from_model(model)` on a `keras.Model`, or on "
                "`keras.Sequential(layers)`."
            )
        super().__init__(*args, **kwargs)

    @classmethod
    def from_model(cls, model: keras.Model) -> "RegularizedModel":
        """Make a regularised model that shares the layers, hence the weights, of another.

        Args:
            model: A `keras.Model`: Functional, Sequential or subclassed. It is not changed. Of
                a model made in the scope of a `tf.distribute.Strategy`, call this in it too.

        Returns:
            A `RegularizedModel`, not compiled. Of a Functional or built Sequential model it has
            the same layers; any other is wrapped, and its weight files are those of the model
            that it wraps.

        Raises:
            TypeError: If `model` is not a `keras.Model`.
            ValueError: If it overrides what `fit`, `evaluate` and `predict` depend on and the
                regularised model would not call, such as `train_step`, `compute_loss`, `compile`
                or `fit` itself. `call` and `build` may be overridden.
        """
        if not isinstance(model, keras.Model):
            raise TypeError(
                "`model` must be a `keras.Model`. "
                f"Received: model={model!r} (of type {type(model)})"
            )
        if isinstance(model, RegularizedModel):
            return model
        from keras_infomcr.models.wrapped_model import WrappedModel, check_overrides  # a subclass

        check_overrides(model)
        if type(model) is Functional:
            return RegularizedModel(model.input, model.output, name=model.name)
        if type(model) is keras.Sequential and len(getattr(model, "outputs", [])) == 1:
            return RegularizedModel(model.inputs[0], model.outputs[0], name=model.name)
        return WrappedModel(model)

    def compile(self, *args, regularizer="sub_batch_perturbation", **kwargs):
        """Configure the model for training.

        Args:
            *args: As for `keras.Model.compile`.
            regularizer: A `keras_infomcr.regularizers.Regularizer`, its name, or `None` for plain
                Keras. Defaults to `"sub_batch_perturbation"`: `SubBatchPerturbation()`.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            ValueError: If `regularizer` is none of these, or the model has no layers.
        """
        if type(self) is RegularizedModel:
            raise ValueError(
                "The model must have layers. Received: a `RegularizedModel` without inputs and "
                "outputs. Make it by `RegularizedModel(inputs, outputs)`, by "
                "`RegularizedModel.from_model(model)`, or as a subclass with `call`."
            )
        regularizer = regularizers.get(regularizer)
        super().compile(*args, **kwargs)
        backend.agree_on_overflow(self.optimizer)
        if regularizer is not None:
            regularizer.check(self)
            self._monitor = RegularizerMonitor(regularizer)
        self._regularizer = regularizer
        self._built_for = None
        self._other_train_function = None
        self._training_record.reset()
        if self.built:
            self.build_regularizer()

    def build_regularizer(self):
        """Let the regulariser make its memory for the weights, once they are known."""
        variables = self.trainable_variables
        if self._regularizer is None or self._built_for == [id(v) for v in variables]:
            return
        refuse_stateful_layers(self)
        with backend.variables_of(self):
            self._regularizer.build(variables)
        self._built_for = [id(v) for v in variables]
        self._training_record.restore_memory()

    @property
    def regularizer(self) -> regularizers.Regularizer | None:
        # Its coefficient may be about to be read or assigned, in the middle of an epoch too.
        backend.attach_state(self)
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
        backend.attach_state(self)
        self._regularizer_active = bool(active)
        before = self.train_function
        self.train_function = self._other_train_function
        self._other_train_function = before
        if before is not None:
            self.make_train_function()

    def make_train_function(self, force=False):
        if force:
            self._other_train_function = None
        if self.built:
            self.build_regularizer()
        before = self.train_function
        with backend.making_function(self, "train"):
            super().make_train_function(force)
        if self.train_function is not before:
            self.train_function = self._awaiting(self.train_function)
        return self.train_function

    def _awaiting(self, train_function):
        def function(*args):
            if self._regularizer is not None and self.regularizer_active:
                self._monitor.awaited = True
            return train_function(*args)

        return function

    def make_test_function(self, force=False):
        with backend.making_function(self, "test"):
            return super().make_test_function(force)

    def make_predict_function(self, force=False):
        before = self.predict_function
        super().make_predict_function(force)
        if self.predict_function is not before:
            self.predict_function = backend.marked_as_step(self, self.predict_function)
        return self.predict_function

    def train_step(self, *args):
        if not self._acts_on(args[-1]):
            return super().train_step(*args)

        def step(data):
            evaluated = objective.Objective(self, self._regularizer.float32)
            return train_step(evaluated, self._regularizer, self._monitor, data)

        return backend.train_step(step, self, *args)

    def _make_function(self, step_function, *args, **kwargs):
        step_function = backend.reducible(self, step_function)
        return super()._make_function(step_function, *args, **kwargs)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if iterator is not None:
            data_batch = backend.own_batch(self, iterator)
        return super()._maybe_symbolic_build(data_batch=data_batch)

    def save(self, filepath, *args, **kwargs):
        """Save the model, as `keras.Model.save`; of several processes only the chief writes.

        A `.keras` file keeps the regulariser and the gate; one of the old `.h5` form does not, and
        the loaded model must be compiled again before it can train, as any of Keras must.
        """
        with file_of_chief(self, filepath) as path:
            super().save(path, *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        """Save the weights, as `keras.Model.save_weights`; of several processes the chief."""
        with file_of_chief(self, filepath) as path:
            super().save_weights(path, *args, **kwargs)

    def _acts_on(self, data):
        if self._regularizer is None or not self.regularizer_active:
            return False
        if self.built and not self.trainable_variables:
            return False
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
        """Train the model, as `keras.Model.fit`, with `infomcr_reg` in the logs.

        Raises:
            ValueError: Also if `y` is an array that holds labels of no class of a sparse
                categorical cross-entropy.
        """
        if self._regularizer is not None:
            # A sample weight of 0 may leave an example out, and an own step may change the labels.
            if kwargs.get("sample_weight") is None and (
                type(self).train_step is RegularizedModel.train_step
            ):
                labels.check_labels(self, y)
            callbacks = _with_log(callbacks, LogRegularizer(self._monitor), verbose)
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)

    @property
    def metrics_variables(self):
        ours = backend.passed_with_metrics(self, self._variables_in_step())
        return [*super().metrics_variables, *ours]

    def _variables_in_step(self):
        """Return the variables, apart from Keras's own, that a training step reads and assigns."""
        if self._regularizer is None:
            return []
        rule = self._regularizer
        return [*self._monitor.variables, rule.strength, *rule.memory]

    def get_compile_config(self):
        config = super().get_compile_config()
        if config.get("optimizer"):
            # Inside the optimizer's entry, where Keras ignores it: `keras.models.clone_model`
            # hands this to plain models too, whose `compile` would refuse another argument.
            config["optimizer"]["keras_infomcr"] = {
                "regularizer": keras.saving.serialize_keras_object(self._regularizer),
                "regularizer_active": self.regularizer_active,
            }
        return config

    def compile_from_config(self, config):
        if type(self).compile is not RegularizedModel.compile:
            return super().compile_from_config(config)  # Keras's warning: compile is custom
        config = dict(config)
        ours = (config.get("optimizer") or {}).get("keras_infomcr", {})
        if ours:
            config["optimizer"] = {
                k: v for k, v in config["optimizer"].items() if k != "keras_infomcr"
            }
        config = keras.saving.deserialize_keras_object(config)
        regularizer = {"regularizer": ours["regularizer"]} if ours else {}
        self.compile(**config, **regularizer)
        self.regularizer_active = ours.get("regularizer_active", True)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)


@keras.saving.register_keras_serializable("keras_infomcr")
class RegularizedFunctional(RegularizedModel, Functional):
    """What `RegularizedModel(inputs, outputs)` makes, so that Keras rewrites no class's bases."""


# A file of the old `.h5` form names the class of a model without its package.
keras.saving.get_custom_objects().update(
    {cls.__name__: cls for cls in (RegularizedModel, RegularizedFunctional)}
)


def _is_functional(args, kwargs):
    """Return whether a `keras.Model` with these arguments is made of inputs and outputs."""
    return len(args) == 2 or ("outputs" in kwargs and (len(args) == 1 or "inputs" in kwargs))


def _make_functional(cls):
    """Base a user's class on the functional variant; all other classes stay as they are."""
    bases = tuple(RegularizedFunctional if b is RegularizedModel else b for b in cls.__bases__)
    cls.__bases__ = bases if RegularizedFunctional in bases else (*bases, RegularizedFunctional)


def _with_log(callbacks, log, verbose):
    """Put a callback before the user's, which see what it writes, and a progress bar after them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
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
