"""The layers of random preprocessing that a model begins with, of which one pass is enough."""

from typing import Any

import keras

from keras_infomcr.keras_internals import all_layers, calls_of_graph
from keras_infomcr.objective.precision import HALF_PRECISION
from keras_infomcr.objective.stand_ins import StandIn, evaluating, standing_in


def preprocessing_layers(model: keras.Model) -> list[keras.Layer]:
    """Return the layers of Keras's preprocessing that the one input passes first, in order.

    There is none if they draw no random numbers, or if something else depends on what they get.
    They have no trainable weights, so that nothing is differentiated in them.
    """
    calls = calls_of_graph(model)
    if (
        calls is None
        or len(model.inputs) != 1
        or type(model).compute_loss is not keras.Model.compute_loss  # which may look at the input
        or any(layer.compute_dtype in HALF_PRECISION for layer in all_layers(model))
    ):
        return []
    found, tensor = [], model.inputs[0]
    while True:
        uses = [c for c in calls if any(a is tensor for a in keras.tree.flatten(c.arguments))]
        if len(uses) != 1 or any(tensor is output for output in model.outputs):
            break
        layer = uses[0].operation
        once = sum(call.operation is layer for call in calls) == 1
        if not (once and _is_preprocessing(layer) and len(uses[0].outputs) == 1):
            break
        found.append(layer)
        [tensor] = uses[0].outputs
    return found if any(hasattr(layer, "generator") for layer in found) else []


def passed_through(layers: list[keras.Layer]) -> Any:
    """Return a context in which layers return what they are given."""
    return standing_in(layers, "call", lambda layer: _Passing())


def _is_preprocessing(layer):
    kind = type(layer)
    of_images = kind.__module__.startswith("keras.src.layers.preprocessing.image_preprocessing.")
    known = of_images or kind in (keras.layers.Rescaling, keras.layers.Normalization)
    return known and layer.activity_regularizer is None and not layer.trainable_variables


class _Passing(StandIn):
    """Stands in for the `call` of a layer."""

    def __call__(self, inputs, *args, **kwargs):
        return inputs if evaluating() else self.original(inputs, *args, **kwargs)
