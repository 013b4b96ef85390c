"""A `keras.Model` whose training step is regularised, and the ways to make one.

The three classes stand in one file because they name each other: `RegularizedModel` is made as one
of the other two, which derive from it, where Keras needs another class for the same model.
"""

import contextlib
import json
import zipfile

import keras

from keras_infomcr import backend
from keras_infomcr.keras_internals import (
    Functional,
    call_has_training_arg,
    own_metrics,
    set_call_has_training_arg,
)
from keras_infomcr.models.averaging_record import AVERAGING_RECORD
from keras_infomcr.models.file_of_chief import file_of_chief
from keras_infomcr.models.overrides import check_overrides
from keras_infomcr.models.regularized_training import RegularizedTraining


@keras.saving.register_keras_serializable("keras_infomcr")
class RegularizedModel(RegularizedTraining, keras.Model):
    """A `keras.Model` that trains towards flat minima.

    It is made in every way in which a `keras.Model` is made: `RegularizedModel(inputs, outputs)`,
    as a subclass with `call()`, or as a subclass that calls `super().__init__(inputs=...,
    outputs=...)`; also by `RegularizedModel.from_model(model)`. It differs in its training step
    alone, and in one argument of `compile`. In the logs of `fit`, `infomcr_reg` is the mean of the
    regulariser's value over the epoch. It is NaN for an epoch in which the gate was closed, and
    the progress bar then leaves it out.

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

    def __new__(cls, *args, **kwargs):
        if cls is RegularizedModel and _is_functional(args, kwargs):
            cls = RegularizedFunctional
        return super().__new__(cls, *args, **kwargs)

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
            model: A `keras.Model`: Functional, Sequential or subclassed. It is not changed. If
                it was made in the scope of a `tf.distribute.Strategy`, call this in that scope too.

        Returns:
            A `RegularizedModel`, not compiled. It has the layers of a Functional or built
            Sequential model. Any other model is wrapped, and then the weight files are the same as
            the wrapped model's.

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
        check_overrides(model)
        if type(model) is Functional:
            return RegularizedModel(model.input, model.output, name=model.name)
        if type(model) is keras.Sequential and len(getattr(model, "outputs", [])) == 1:
            return RegularizedModel(model.inputs[0], model.outputs[0], name=model.name)
        return WrappedModel(model)

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


@keras.saving.register_keras_serializable("keras_infomcr")
class RegularizedFunctional(RegularizedModel, Functional):
    """What `RegularizedModel(inputs, outputs)` makes, so that Keras rewrites no class's bases."""


@keras.saving.register_keras_serializable("keras_infomcr")
class WrappedModel(RegularizedModel):
    """What `RegularizedModel.from_model` makes of a model that has no graph of layers.

    Args:
        model: A `keras.Model`.
        name: String, name of the model. Defaults to the name of `model`.
        **kwargs: As for `keras.Model`.
    """

    def __init__(self, model, name=None, **kwargs):
        super().__init__(
            name=name or model.name, dtype=model.dtype_policy, autocast=model.autocast, **kwargs
        )
        self.model = model
        self.built = model.built
        # Without it Keras trains the model as it would in inference; so does it wrapped.
        set_call_has_training_arg(self, call_has_training_arg(model))

    def build(self, input_shape):
        # A model without a `build` of its own is built when it is called.
        if not self.model.built and type(self.model).build is not keras.Model.build:
            self.model.build(input_shape)

    @property
    def metrics(self):
        # Keras leaves out all metrics of an inner model, because of what its `compile` was given.
        return [*super().metrics, *own_metrics(self.model)]

    def call(self, inputs, training=None):
        if training is None or not call_has_training_arg(self.model):
            return self.model(inputs)
        if not self.model.built:
            return self.model(inputs, training=training)
        return backend.forward(self.model, inputs, training=training)

    def save_weights(self, filepath, *args, **kwargs):
        """Save the weights, and the optimizer's, as the wrapped model does."""
        with file_of_chief(self, filepath) as path, self._state_lent_to_wrapped():
            self.model.save_weights(path, *args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        """Load the weights, and the optimizer's, as the wrapped model does."""
        if _is_archive_of(type(self), filepath):
            return super().load_weights(filepath, *args, **kwargs)
        with self._state_lent_to_wrapped():
            self.model.load_weights(filepath, *args, **kwargs)

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "model": keras.saving.serialize_keras_object(self.model),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)

    @contextlib.contextmanager
    def _state_lent_to_wrapped(self):
        """Let the wrapped model's weight files hold what a compiled model's would."""
        lent = {
            "_training_record": self._training_record,
            "learning_rate_peak": self.learning_rate_peak,
        }
        if AVERAGING_RECORD in self.__dict__:
            lent[AVERAGING_RECORD] = self.__dict__[AVERAGING_RECORD]
        if self.compiled:
            lent["optimizer"] = self.optimizer
        own = {name: self.model.__dict__[name] for name in lent if name in self.model.__dict__}
        for name, value in lent.items():
            object.__setattr__(self.model, name, value)
        try:
            yield
        finally:
            for name in lent:
                object.__delattr__(self.model, name)
            for name, value in own.items():
                object.__setattr__(self.model, name, value)


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


def _is_archive_of(cls, filepath):
    """Return whether a file is a `.keras` archive of a model of a class."""
    if not str(filepath).endswith(".keras") or not zipfile.is_zipfile(filepath):
        return False
    with zipfile.ZipFile(filepath) as archive:
        return json.loads(archive.read("config.json"))["class_name"] == cls.__name__
