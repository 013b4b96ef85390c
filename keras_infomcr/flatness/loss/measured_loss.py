"""The loss of a model that is measured: the compiled loss, or one that is given in its place."""

from collections.abc import Hashable
from typing import Any

import keras

from keras_infomcr.flatness.running.checks import check_compiled
from keras_infomcr.flatness.running.compiled_for import compiled_for


def resolved_loss(model: keras.Model, loss: Any = None) -> keras.Model:
    """Return what bears the loss that is measured: the model itself, or a stand-in for it.

    What asks a compiled model about its loss, and lets Keras compute it, takes the stand-in in its
    place: `losses_of`, `is_mean_over_examples`, `check_labels`, `kind_of_loss`, `compiled_loss`.
    The stand-in is the same for the same loss as long as the model lives, so that it can be part
    of a key of `compiled_for`.

    Args:
        model: A `keras.Model`, compiled with a loss unless `loss` is given.
        loss: As for `hessian_trace`; `None` for the compiled loss.

    Raises:
        TypeError: If the model is no `keras.Model`.
        ValueError: If there is no loss.
    """
    check_compiled(model, loss)
    if loss is None:
        return model
    return compiled_for(model, ("resolved_loss", _key(loss)), lambda: _LossBearer(model, loss))


class _LossBearer(keras.Model):
    """Has the loss that a model would have, were it of Keras's own class and compiled with a loss.

    It is a model so that `compile` makes of names, objects, functions and structures of these what
    it makes of them for any model. What a `compute_loss` or `train_step` of the model's own adds
    has no part in it. What layers have added by `add_loss`, and penalties on activities, have.
    """

    def __init__(self, model: keras.Model, loss: Any):
        super().__init__()
        # Past Keras's tracking, for which the model would be a layer of this one.
        object.__setattr__(self, "_model", model)
        names = getattr(model, "output_names", None)
        if names is not None:  # by which a dictionary of losses finds its outputs
            self.output_names = names
        self.compile(loss=loss)

    @property
    def losses(self) -> list:
        return self._model.losses

    @property
    def outputs(self) -> Any:
        return getattr(self._model, "outputs", None)

    def _flatten_layers(self, *args, **kwargs):
        # Keras asks for them while it sets up a model, before there is one to stand in for.
        model = self.__dict__.get("_model")
        return (model or super())._flatten_layers(*args, **kwargs)


def _key(loss: Any) -> Any:
    """Return a structure of losses in a form that can be hashed."""
    if isinstance(loss, dict):
        return tuple((name, _key(loss[name])) for name in sorted(loss))
    if isinstance(loss, (list, tuple)):
        return tuple(map(_key, loss))
    return loss if isinstance(loss, Hashable) else _ById(loss)


class _ById:
    """Stands for a loss object that cannot be hashed, such as one of a dataclass."""

    def __init__(self, loss: Any):
        self.loss = loss  # held, so that no other object gets its `id`

    def __hash__(self) -> int:
        return id(self.loss)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _ById) and other.loss is self.loss
