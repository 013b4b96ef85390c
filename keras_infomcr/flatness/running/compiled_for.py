"""What is compiled for a model, kept as long as the model lives."""

import collections
from collections.abc import Callable, Hashable
from typing import Any

import keras

from keras_infomcr.keras_internals import all_layers, compile_loss, loss_tracker

_ATTRIBUTE = "_keras_infomcr_compiled"

# A function written in place, `loss=lambda ...`, is another key each time it is passed.
_MOST_KEPT = 32


def compiled_for(model: keras.Model, key: Hashable, make: Callable[[], Any]) -> Any:
    """Return what `make()` returns, or what it has returned for an equal key and the same model.

    What is kept is dropped when the model is compiled again, `trainable` of a layer changes, or
    the model begins or ceases to run eagerly. Other changes of a layer, such as another dropout
    rate, are not noticed, as Keras's own training step does not notice them: call `model.compile`
    again.

    Args:
        model: A `keras.Model`.
        key: What `make` depends on besides the model: a name, `training`, a loss. Functions and
            Keras's objects compare by identity; they are kept with the result, so that no other
            object can take their place.
        make: Function of no arguments. What it returns may hold the model.
    """
    # `compile` makes the tracker anew, also without a loss.
    state = [*model.trainable_variables, compile_loss(model), loss_tracker(model)]
    flags = [model.run_eagerly, *(layer.trainable for layer in all_layers(model))]
    kept = model.__dict__.get(_ATTRIBUTE)
    if kept is None or not kept.fits(state, flags):
        kept = _Kept(state, flags)
        # On the model itself, not in a dictionary of ours with weak keys: what is compiled holds
        # the model, so that such a dictionary would keep both alive. A circle with the model the
        # garbage collector frees. Past Keras's tracking, which would save and wrap it.
        object.__setattr__(model, _ATTRIBUTE, kept)
    return kept.get(key, make)


class _Kept:
    """Results by their keys, for one state of a model.

    No dictionary, in which Keras would look for layers to save.
    """

    def __init__(self, state: list, flags: list[bool]):
        self._state = state
        self._flags = flags
        self._results = collections.OrderedDict()

    def fits(self, state: list, flags: list[bool]) -> bool:
        """Return whether the model is as it was. Variables are compared by identity."""
        same = len(state) == len(self._state) and all(map(_is, state, self._state))
        return same and flags == self._flags

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what is kept by a key, made if need be; what was used longest ago makes room."""
        if key not in self._results:
            self._results[key] = make()
        self._results.move_to_end(key)
        if len(self._results) > _MOST_KEPT:
            self._results.popitem(last=False)
        return self._results[key]


def _is(one: Any, other: Any) -> bool:
    return one is other
