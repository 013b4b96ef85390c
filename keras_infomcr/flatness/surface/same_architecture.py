"""Two models of one architecture."""

import itertools
from typing import Any

import keras

from keras_infomcr.keras_internals import all_layers


def paired_weights(model: keras.Model, other: Any) -> dict[int, keras.Variable]:
    """Return the weight of another model that each weight of a model corresponds to, by its `id`.

    Args:
        model: A built `keras.Model`.
        other: What the user has given as another model of the same architecture. Names, and what
            is trainable, may differ.

    Raises:
        TypeError: If `other` is no `keras.Model`.
        ValueError: If it is not built, or the layers differ in class, order or shapes.
    """
    if not isinstance(other, keras.Model):
        raise TypeError(
            "The other model must be a `keras.Model`. "
            f"Received: other={other!r} (of type {type(other)})"
        )
    if not other.built:
        raise ValueError(
            f"The other model must be built. Received: other={other!r}. Call it on data first."
        )
    layers = itertools.zip_longest(_described(model), _described(other), fillvalue="none")
    for number, (one, another) in enumerate(layers):
        if one != another:
            raise ValueError(
                "Both models must have the same layers, in the same order and with weights of the "
                f"same shapes. Received: models whose layers {number} (from 0) differ: {one}, and "
                f"{another}. Build them by the same function."
            )
    return {id(v): u for v, u in zip(model.weights, other.weights)}


def _described(model: keras.Model) -> list[str]:
    """Return the class, and the shapes of the weights, of each layer that is no model."""
    # The classes of the models may differ: a `RegularizedModel` trains what a `Model` was.
    kinds = keras.Model, keras.layers.InputLayer
    return [
        f"{type(layer).__name__} with weights of shapes {[tuple(v.shape) for v in layer.weights]}"
        for layer in all_layers(model)
        if not isinstance(layer, kinds)
    ]
