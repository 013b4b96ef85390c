"""The kinds of layers whose gradients of all examples follow from inputs and output gradients.

A kind is a function that gives the gradients by each weight, as the parts of `gradient_parts`, and
a line in one of the tables that are merged here.
"""

import keras

from keras_infomcr.flatness.per_example.convolution_kinds import CONVOLUTIONS
from keras_infomcr.flatness.per_example.einsum_kinds import EINSUMS
from keras_infomcr.flatness.per_example.embedding_kinds import EMBEDDINGS
from keras_infomcr.flatness.per_example.gradient_parts import Kind
from keras_infomcr.flatness.per_example.normalization_kinds import NORMALIZATIONS

KINDS = EINSUMS | CONVOLUTIONS | NORMALIZATIONS | EMBEDDINGS

# What a subclass may define anew, besides what its base lacks: no part of a call.
_HARMLESS = {"build", "compute_output_shape", "compute_output_spec", "from_config", "get_config"}
_OF_CALLS = {"__call__", "__getattr__", "__getattribute__"}


def kind_of(layer: keras.Layer) -> Kind | None:
    """Return the kind of a layer, `None` if it is not known or not built.

    A subclass is of its base's kind if it replaces nothing that takes part in a call.
    """
    base = next((cls for cls in type(layer).__mro__ if cls in KINDS), None)
    if base is None or not layer.built or "call" in vars(layer):
        return None
    added = type(layer).__mro__[: type(layer).__mro__.index(base)]
    changed = any(_matters(name, base) for cls in added for name in vars(cls))
    return KINDS[base] if not changed and KINDS[base].fits(layer) else None


def _matters(name: str, base: type) -> bool:
    if name.startswith("__"):
        return name in _OF_CALLS
    return hasattr(base, name) and name not in _HARMLESS
