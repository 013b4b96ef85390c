"""A regularised model around a model that has no graph of layers."""

import contextlib
import json
import zipfile

import keras

from keras_infomcr import backend
from keras_infomcr.models.file_of_chief import file_of_chief
from keras_infomcr.models.regularized_model import RegularizedModel

# What Keras trains, evaluates and predicts by: all of its trainer, and what that asks a layer for.
# (`loss` is an attribute that `compile` sets.)
_USED_BY_FIT = {
    name
    for cls in keras.Model.__mro__
    if cls.__name__.endswith("Trainer")
    for name in vars(cls)
    if not name.startswith("__") and name != "loss"
} | {"losses", "metrics_variables", "non_trainable_variables", "trainable_variables"}


@keras.saving.register_keras_serializable("keras_infomcr")
class WrappedModel(RegularizedModel):
    """What `RegularizedModel.from_model` makes of a model that has no graph of layers.

    Args:
        model: A `keras.Model`.
        name: String, name of the model. Defaults to that of `model`.
        **kwargs: As for `keras.Model`.
    """

    def __init__(self, model, name=None, **kwargs):
        super().__init__(
            name=name or model.name, dtype=model.dtype_policy, autocast=model.autocast, **kwargs
        )
        self.model = model
        self.built = model.built
        # Without it Keras trains the model as it would in inference; so does it wrapped.
        self._call_has_training_arg = model._call_has_training_arg

    def build(self, input_shape):
        # A model without a `build` of its own is built when it is called.
        if not self.model.built and type(self.model).build is not keras.Model.build:
            self.model.build(input_shape)

    @property
    def metrics(self):
        # Keras leaves out all metrics of an inner model, for the sake of those of its `compile`.
        return [*super().metrics, *self.model._metrics]

    def call(self, inputs, training=None):
        if training is None or not self.model._call_has_training_arg:
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
        lent = {"_training_record": self._training_record}
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


def check_overrides(model):
    """Refuse a model with methods of its own that a model around it would not call."""
    overridden = [
        name
        for name in sorted(_USED_BY_FIT, key=lambda name: (name.startswith("_"), name))
        if getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model)
    ]
    if not overridden:
        return
    remedy = "Derive its class from `RegularizedModel` instead of `keras.Model`."
    if hasattr(model, "preprocess_samples"):  # a task of KerasHub
        remedy = (
            "Call `RegularizedModel(model.input, model.output)`, which shares the layers and so "
            "the weights of `model`, and train it on preprocessed data, as "
            "`model.preprocess_samples(x, y)` returns them. `model` itself then evaluates and "
            "predicts as before."
        )
    raise ValueError(
        f"`model` must not override {', '.join(f'`{name}`' for name in overridden)}, which the "
        f"regularised model would not call. Received: model={model!r} (of type {type(model)}). "
        f"{remedy}"
    )


def _is_archive_of(cls, filepath):
    """Return whether a file is a `.keras` archive of a model of a class."""
    if not str(filepath).endswith(".keras") or not zipfile.is_zipfile(filepath):
        return False
    with zipfile.ZipFile(filepath) as archive:
        return json.loads(archive.read("config.json"))["class_name"] == cls.__name__
