"""Layers whose Gram matrices of per-example gradients come from one backward pass.

A tap is an identity operation on the outputs of a layer. In the backward pass of sum_i m_i it meets
the layer's inputs and the gradients by its outputs, for all examples at once. It computes from them
the Gram matrix of the examples' gradients by the layer's weights, and returns it as the "gradient"
of a dummy argument, the probe. No gradient of a single example is stored.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.replaced import replaced
from keras_infomcr.flatness.per_example.gradient_parts import gram_of_calls
from keras_infomcr.flatness.per_example.layer_grams import KINDS
from keras_infomcr.keras_internals import all_layers, is_rematerialized


class Taps:
    """The layers of a model whose Gram matrices come from one backward pass.

    Args:
        model: A built `keras.Model`.

    Attributes:
        layers: List of the layers. Every evaluation within `noting` may shorten it.
    """

    def __init__(self, model: keras.Model):
        with backend.float64_allowed():
            double = backend.widest_float() == "float64"
        # A subclass may do more than its base, and float64 is needed for Gram matrices whose
        # determinants are to be right.
        self._known = [
            layer
            for layer in all_layers(model)
            if double
            and type(layer) in KINDS
            and layer.variable_dtype in ("float32", "float64")
            and not is_rematerialized(layer)
        ]
        self._trainable = {id(v) for v in model.trainable_variables}
        self._read_elsewhere = set()
        self._readers = {}
        self._first_rows = collections.defaultdict(list)
        self.layers = self._known

    def drop_all(self) -> None:
        """Tap no layer, where the gradients of single examples are formed for all weights."""
        self.layers = []

    @contextlib.contextmanager
    def noting(self, scope: keras.StatelessScope, num_examples: int) -> Iterator[None]:
        """Drop the layers that an evaluation does not call once, with all examples together.

        Args:
            scope: The `keras.StatelessScope` of the evaluation.
            num_examples: Integer, the examples of the evaluation.
        """
        calls, inside = collections.Counter(), [None]

        def noting_call(layer, call):
            def noted(inputs, *args, **kwargs):
                inside.append(layer)
                try:
                    outputs = call(inputs, *args, **kwargs)
                finally:
                    inside.pop()
                # Sparse inputs have no `ndim`. What is traced may be a loop's body, which runs
                # more often than it is called.
                usual = (
                    hasattr(inputs, "ndim")
                    and not backend.is_traced(outputs)
                    and inputs.shape[0] == outputs.shape[0] == num_examples
                )
                if usual:
                    first = (ops.convert_to_numpy(array[0]) for array in (inputs, outputs))
                    self._first_rows[layer].append(tuple(first))
                calls[layer] += 1 if usual and not kwargs.get("training") else 2
                return outputs

            return noted

        value_of = scope.get_current_value

        def noting_value(variable):
            owner = inside[-1]
            own = owner is not None and any(variable is v for v in owner.variables)
            if not own or self._readers.setdefault(id(variable), owner) is not owner:
                self._read_elsewhere.add(id(variable))
            return value_of(variable)

        # A weight that something else reads too, as a tied embedding is, has gradients that do not
        # pass through its layer's outputs: its layer is not tapped.
        scope.get_current_value = noting_value
        with _calls_replaced(self._known, noting_call):
            yield
        self.layers = [x for x in self.layers if calls[x] == 1 and self._names(x)]

    def coupled(self) -> bool:
        """Return whether a layer saw another first example in one evaluation than in another.

        Rounding is a thousand times smaller than the limit, the effect of a layer that couples
        examples is larger.
        """
        with np.errstate(invalid="ignore"):
            return any(
                np.max(np.abs(array - other)) > 1e-3 * np.max(np.abs(array))
                for first, *others in self._first_rows.values()
                for rows in others
                for array, other in zip(first, rows)
            )

    def forget_evaluations(self) -> None:
        """Drop the arrays that `coupled` compares: the taps live as long as the model."""
        self._first_rows.clear()

    def weights(self, layer: keras.Layer) -> list[keras.Variable]:
        """Return the trainable variables of a tapped layer that its Gram matrix takes in."""
        return [getattr(layer, name) for name in self._names(layer)]

    def _names(self, layer: keras.Layer) -> list[str]:
        values = {name: getattr(layer, name, None) for name in KINDS[type(layer)].weights}
        taken = self._trainable - self._read_elsewhere
        return [k for k, v in values.items() if isinstance(v, keras.Variable) and id(v) in taken]

    def open(self, probes: list) -> contextlib.AbstractContextManager:
        """Return a context in which the layers are tapped.

        Args:
            probes: List of arrays `[N, N]` of zeros, float64, one for each of `layers`: their
                gradients will be the Gram matrices.
        """
        probes = dict(zip(self.layers, probes))

        def tapped_call(layer, call):
            def tapped(inputs, *args, **kwargs):
                # The activation comes after the tap, which needs the gradients before it.
                activation = getattr(layer, "activation", None)
                with replaced(layer, "activation", None):
                    outputs = call(inputs, *args, **kwargs)
                outputs = _tap(layer, self._names(layer), inputs, outputs, probes[layer])
                return outputs if activation is None else activation(outputs)

            return tapped

        return _calls_replaced(self.layers, tapped_call)


@contextlib.contextmanager
def _calls_replaced(layers: list[keras.Layer], replacement: Callable) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, "call", replacement(layer, layer.call)))
        yield


def _tap(layer: keras.Layer, names: list[str], inputs: Any, outputs: Any, probe: Any) -> Any:
    parts_of = KINDS[type(layer)].parts_of(layer)

    @ops.custom_gradient
    def identity(outputs, inputs, probe):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            with backend.float64_allowed():
                parts = parts_of(backend.delayed_until(inputs, upstream), upstream)
                total = sum(gram_of_calls([parts[name]()]) for name in names)
            none = ops.broadcast_to(ops.zeros((), inputs.dtype), inputs.shape)
            # One layer at a time, which saves memory: the gradients of the next layer wait until
            # this Gram matrix is computed.
            return backend.delayed_until(upstream, total), none, total

        return ops.copy(outputs), gradient  # torch lets nobody change an input in place

    return identity(outputs, ops.stop_gradient(ops.cast(inputs, outputs.dtype)), probe)
