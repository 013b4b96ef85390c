"""torch: calls of a model at weights that are not the values of its variables.

Private names of torch used here, unchanged from 2.1 to 2.13: `_parameters` and `_buffers` of a
module, and `_checkpoint_without_reentrant_generator`, which `checkpoint` calls: code that has
imported the function `checkpoint` before would not see that replaced.
"""

import contextlib
from collections.abc import Iterator

import keras
import torch
import torch.utils.checkpoint

from keras_infomcr.keras_internals import all_layers, value_held


def forward(model: keras.Model, x, **kwargs):
    """Return the outputs."""
    return model(x, **kwargs)


@contextlib.contextmanager
def modules_at_variables(model: keras.Model) -> Iterator[None]:
    """Let torch modules among the layers, which hold their tensors themselves, see the scope."""
    layers = [x for x in all_layers(model) if isinstance(x, keras.layers.TorchModuleWrapper)]
    values = {id(value_held(v)): v.value for layer in layers for v in layer.variables}
    modules = [module for layer in layers for module in layer.modules()]
    modes = [(module, module.training) for module in modules]
    # A buffer is in no scope of Keras's. The evaluation moves a copy of it.
    tensors = [
        (entries, name, tensor)
        for module in modules
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None
    ]
    for entries, name, tensor in tensors:
        entries[name] = values[id(tensor)] if id(tensor) in values else tensor.clone()
    try:
        yield
    finally:
        for entries, name, tensor in tensors:
            entries[name] = tensor
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_rematerialization() -> Iterator[None]:
    """Call what `torch.utils.checkpoint` would call again in the backward pass once only."""

    def called(function, *args, use_reentrant=None, **kwargs):
        return function(*args, **kwargs)

    def around_the_call(*args, **kwargs):
        yield

    replacements = {
        "checkpoint": called,
        "_checkpoint_without_reentrant_generator": around_the_call,
    }
    module = torch.utils.checkpoint
    originals = {name: getattr(module, name) for name in replacements if hasattr(module, name)}
    for name in originals:
        setattr(module, name, replacements[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def functions_may_hide_weights() -> bool:
    """Return `False`: `torch.utils.checkpoint` sees all tensors."""
    return False


def assigns_in_place() -> bool:
    """Return `True`: there is one value of each variable at a time."""
    return True
