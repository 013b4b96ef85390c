"""The gradients by the weights of `Dense` and `EinsumDense`: outputs = einsum(inputs, kernel)."""

import itertools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_infomcr.flatness.per_example.gradient_parts import Kind, Outer, Rows


class _Equation(NamedTuple):
    """The axes of inputs, kernel and outputs as strings of letters, the batch's first."""

    inputs: str
    kernel: str
    outputs: str

    @classmethod
    def of(cls, equation: str, num_axes: int | None = None) -> "_Equation":
        """Return an equation of Keras for inputs of so many axes, one for an ellipsis if `None`."""
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        num_named = equation.replace("...", "").index(",")
        elided = unused[: 1 if num_axes is None else num_axes - num_named]
        inputs, rest = equation.replace("...", "".join(elided)).split(",")
        return cls(inputs, *rest.split("->"))

    def is_known(self) -> bool:
        """Return whether the gradients of the examples are sums of outer products."""
        inputs, kernel, outputs = map(set, self)
        each_once = all(len(set(axes)) == len(axes) for axes in self)
        batch = self.inputs[0]
        of_batch = batch == self.outputs[0] and batch not in kernel
        return each_once and of_batch and kernel <= inputs | outputs and outputs <= inputs | kernel

    def outer_products(self, inputs: Any, upstream: Any) -> list[Outer]:
        """Return the gradients by the kernel."""
        # Axes of all three number groups of the kernel, each of which sees inputs of its own.
        grouping = [a for a in self.kernel if a in self.inputs and a in self.outputs]
        groups = [grouping] if grouping else []
        positions = [a for a in self.outputs[1:] if a not in self.kernel]
        contracted = [a for a in self.kernel if a not in self.outputs]
        free = [a for a in self.kernel if a not in self.inputs]
        inputs = _arranged(inputs, self.inputs, *groups, positions, contracted)
        return [Outer([inputs], _arranged(upstream, self.outputs, *groups, positions, free))]


def _arranged(array: Any, axes: str, *groups: Any) -> Any:
    """Return an array with all axes of each group merged into one, after the batch."""
    order = [0, *(axes.index(axis) for axis in itertools.chain(*groups))]
    summed = [k for k in range(len(axes)) if k not in order]  # axes that the outputs lack
    if summed:
        array = ops.sum(array, summed, keepdims=True)
    if [*order, *summed] != list(range(len(axes))):
        array = ops.transpose(array, [*order, *summed])
    sizes = iter(array.shape[1:])
    merged = [math.prod(itertools.islice(sizes, len(group))) for group in groups]
    return ops.reshape(array, (array.shape[0], *merged))


def _einsum(layer: keras.Layer) -> Callable:
    # Strings and arrays, not the layer itself, which the gradient functions would keep alive.
    equation, bias_axes = _equation_of(layer), getattr(layer, "bias_axes", "y") or ""
    adapters = _adapters(layer) if layer.lora_enabled else lambda *_: {}

    def parts(inputs, upstream):
        axes = _Equation.of(equation, inputs.ndim)
        rest = [a for a in axes.outputs[1:] if a not in bias_axes]
        summed = [axes.outputs.index(a) for a in rest]
        bias = ops.sum(upstream, summed) if summed else upstream
        return {
            "kernel": lambda: axes.outer_products(inputs, upstream),
            "bias": lambda: [Rows(ops.reshape(bias, (bias.shape[0], -1)))],
            **adapters(axes, inputs, upstream),
        }

    return parts


def _adapters(layer: keras.Layer) -> Callable:
    """Return what gives the parts of the two factors of low rank that are added to a kernel."""
    # Float32, whatever the dtype of the layer.
    down, up = layer.lora_kernel_a.value, layer.lora_kernel_b.value
    scale = layer.lora_alpha / layer.lora_rank

    def parts(axes, inputs, upstream):
        last = axes.kernel[-1]
        rank = next(a for a in string.ascii_letters if a not in "".join(axes))
        hidden = axes.outputs.replace(last, rank)
        to_hidden = _Equation(axes.inputs, axes.kernel.replace(last, rank), hidden)
        from_hidden = _Equation(hidden, rank + last, axes.outputs)

        def of_down():
            equation = f"{axes.outputs},{rank}{last}->{hidden}"
            of_hidden = ops.einsum(equation, upstream, ops.cast(up, upstream.dtype))
            return to_hidden.outer_products(inputs, scale * of_hidden)

        def of_up():
            equation = f"{to_hidden.inputs},{to_hidden.kernel}->{hidden}"
            outputs = ops.einsum(equation, inputs, ops.cast(down, inputs.dtype))
            return from_hidden.outer_products(outputs, scale * upstream)

        return {"lora_kernel_a": of_down, "lora_kernel_b": of_up}

    return parts


def _equation_of(layer: keras.Layer) -> str:
    return getattr(layer, "equation", "...x,xy->...y")


def _fits(layer: keras.Layer) -> bool:
    """Return whether gradients are outer products, the adapters' too."""
    axes = _Equation.of(_equation_of(layer))
    last_is_free = axes.kernel[-1] not in axes.inputs
    bias_of_batch = axes.inputs[0] in (getattr(layer, "bias_axes", "") or "")
    return axes.is_known() and (last_is_free or not layer.lora_enabled) and not bias_of_batch


_EINSUM = Kind(_einsum, ("kernel", "bias", "lora_kernel_a", "lora_kernel_b"), _fits)
EINSUMS = {keras.layers.Dense: _EINSUM, keras.layers.EinsumDense: _EINSUM}
