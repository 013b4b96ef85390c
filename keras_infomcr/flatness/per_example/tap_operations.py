"""Taps: identity operations on the outputs of a layer.

In the backward pass of sum_i m_i a tap meets the layer's inputs and the gradients by its outputs,
for all examples at once. It computes from them the Gram matrix of the examples' gradients by the
layer's weights, and returns it as the "gradient" of a dummy argument, the probe. No gradient of a
single example is stored. A noting tap returns what it meets as the "gradients" of two probes.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_infomcr import backend


def gram_tap(gram_of: Callable, inputs: Any, outputs: Any, probe: Any) -> Any:
    """Return the outputs; the gradient by the probe is the Gram matrix."""

    @ops.custom_gradient
    def identity(outputs, inputs, probe):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            total = gram_of([(backend.delayed_until(inputs, upstream), upstream)])
            # One layer at a time, which saves memory: the gradients of the next layer wait until
            # this Gram matrix is computed.
            return backend.delayed_until(upstream, total), _no_gradient(inputs), total

        return ops.copy(outputs), gradient  # torch lets nobody change an input in place

    return identity(outputs, _constant(inputs, outputs), probe)


def noting_tap(inputs: Any, outputs: Any, probe_of_inputs: Any, probe_of_outputs: Any) -> Any:
    """Return the outputs; the gradients by the probes are inputs and output gradients."""

    @ops.custom_gradient
    def identity(outputs, inputs, probe_of_inputs, probe_of_outputs):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            return upstream, _no_gradient(inputs), inputs, upstream

        return ops.copy(outputs), gradient

    return identity(outputs, _constant(inputs, outputs), probe_of_inputs, probe_of_outputs)


def _constant(inputs: Any, outputs: Any) -> Any:
    return ops.stop_gradient(ops.cast(inputs, outputs.dtype))


def _no_gradient(inputs: Any) -> Any:
    return ops.broadcast_to(ops.zeros((), inputs.dtype), inputs.shape)
