"""The filters that weights consist of, and random directions scaled by them."""

import keras
import numpy as np
from keras import layers

from keras_infomcr.keras_internals import all_layers

# Biases, and the parameters of normalisations and of activations, whatever their shape: those of
# attention and of `GRU` have several axes.
_LEFT_STILL = {"alpha", "beta", "bias", "gamma", "scale"}


def filter_axes(model: keras.Model) -> list[tuple[int, ...] | None]:
    """Return, for each trainable variable, the axes that one filter extends over.

    A filter is what makes one output of a layer. It is `None` for what random directions leave
    still: biases, parameters of normalisations, and all else of one axis.
    """
    special = {}
    for layer in all_layers(model):
        for kinds, name, axes in _SPECIAL:
            kernel = getattr(layer, name, None) if isinstance(layer, kinds) else None
            if kernel is not None:
                special[id(kernel)] = axes(layer, len(kernel.shape))

    def axes_of(variable):
        rank = len(variable.shape)
        if rank < 2 or variable.name in _LEFT_STILL:
            return None
        # The last axis of most kernels counts the outputs.
        return tuple(special.get(id(variable), range(rank - 1)))

    return [axes_of(variable) for variable in model.trainable_variables]


def _of_depthwise(layer: keras.Layer, rank: int) -> range:
    # [..., inputs, multiplier], of which each pair makes an output
    return range(rank - 2)


def _of_transposed(layer: keras.Layer, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1]  # [..., outputs, inputs]


def _of_embedding(layer: keras.Layer, rank: int) -> list[int]:
    return [rank - 1]  # A row is all there is of one entry of the vocabulary.


def _of_einsum(layer: layers.EinsumDense, rank: int) -> list[int]:
    operands, output = layer.equation.split("->")
    kernel = operands.split(",")[1].strip()
    return [axis for axis, letter in enumerate(kernel) if letter not in output]


# Classes of layers whose last axis is not what counts the outputs, or not alone; the attribute that
# is the kernel; and the axes of a filter in it.
_SPECIAL = [
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), "kernel", _of_depthwise),
    ((layers.SeparableConv1D, layers.SeparableConv2D), "depthwise_kernel", _of_depthwise),
    (
        (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        "kernel",
        _of_transposed,
    ),
    (layers.Embedding, "embeddings", _of_embedding),
    (layers.EinsumDense, "kernel", _of_einsum),
]


def scaled(
    direction: np.ndarray, weights: np.ndarray, axes: tuple[int, ...] | None, normalize: str | None
) -> np.ndarray:
    """Return a random direction of one variable, scaled by its weights.

    Args:
        direction: Array of standard normal numbers.
        weights: Array of the same shape.
        axes: What `filter_axes` says of the variable.
        normalize: As for `loss_surface`.
    """
    if axes is None:
        return np.zeros_like(direction)
    if normalize is None:
        return direction
    if normalize == "weight":
        return direction * np.abs(weights)
    axes = None if normalize == "layer" else axes
    return direction * (_norms(weights, axes) / _norms(direction, axes))


def _norms(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return np.sqrt(np.sum(array**2, axis=axes, keepdims=True))
