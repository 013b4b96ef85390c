"""The logits behind the probabilities that a model returns."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras

from keras_infomcr.keras_internals import all_layers, known_logits
from keras_infomcr.objective.replaced import replaced

_KINDS = [(keras.activations.softmax, "categorical"), (keras.activations.sigmoid, "binary")]


class Logits:
    """What the softmax and sigmoid activations of one call of a model were applied to."""

    def __init__(self):
        self._noted = []

    def of(self, output: Any, kind: str) -> Any:
        """Return the logits of an output of the model, or `None` if they are not known.

        Keras notes them on the output as `_keras_logits`, unless, as in JAX, arrays take no
        attributes.

        Args:
            output: Array of probabilities.
            kind: `"categorical"`, for the logits of a softmax over the last axis, or `"binary"`,
                for the logits of a sigmoid.
        """
        # By identity: what is returned after a further layer is no output of the activation.
        for probabilities, inputs, of_kind in self._noted:
            if probabilities is output:
                return inputs if of_kind == kind else None
        return known_logits(output)

    def noting(self, activation: Callable, kind: str, axis: Any = -1) -> Callable:
        """Return an activation that notes what it is applied to, unless that is masked."""

        def noting_activation(inputs, mask=None, **kwargs):
            if mask is not None:
                return activation(inputs, mask=mask, **kwargs)
            outputs = activation(inputs, **kwargs)
            axes = [a % inputs.ndim for a in keras.tree.flatten(axis)]
            self._noted.append((outputs, inputs, kind if axes == [inputs.ndim - 1] else None))
            return outputs

        return noting_activation


def predict_with_logits(model: keras.Model, predict: Callable, x: Any) -> tuple[Any, Logits]:
    """Return `predict(x)` and the `Logits` of that call."""
    logits = Logits()
    with contextlib.ExitStack() as stack:
        for layer in all_layers(model):
            # Recurrent layers have a property by this name.
            activation = layer.__dict__.get("activation")
            kind = next((kind for known, kind in _KINDS if activation is known), None)
            if kind:
                noting = logits.noting(activation, kind)
                stack.enter_context(replaced(layer, "activation", noting))
            elif isinstance(layer, keras.layers.Softmax):
                noting = logits.noting(layer.call, "categorical", layer.axis)
                stack.enter_context(replaced(layer, "call", noting))
        return predict(x), logits
