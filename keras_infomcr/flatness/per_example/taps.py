"""Layers whose Gram matrices of per-example gradients come from one backward pass.

A layer that is called several times has a tap for each call. Its Gram matrix, of the sum over the
calls, is computed after the backward pass.
"""

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.per_example.calls import Calls, Form, calls_before_activations
from keras_infomcr.flatness.per_example.gradient_parts import gram_of_calls
from keras_infomcr.flatness.per_example.layer_kinds import kind_of
from keras_infomcr.flatness.per_example.tap_operations import gram_tap, noting_tap
from keras_infomcr.keras_internals import all_layers, is_rematerialized


class CallsChangedError(Exception):
    """A pass that called layers in another way than was noted: theirs are no Gram matrices.

    Attributes:
        layers: List of the layers.
    """

    def __init__(self, layers: list[keras.Layer]):
        super().__init__()
        self.layers = layers


class Taps:
    """The layers of a model whose Gram matrices come from one backward pass.

    Args:
        model: A built `keras.Model`.

    Attributes:
        layers: List of the layers. Every evaluation within `noting` may shorten it.
        kinds: Dictionary of all layers of known kinds, with their `Kind`.
        shared: Dictionary of the layers without a tap that compute something once, for all examples
            together, with the `Form` of the call.
    """

    def __init__(self, model: keras.Model):
        with backend.float64_allowed():
            double = backend.widest_float() == "float64"
        # Float64 is needed for Gram matrices whose determinants are to be right.
        known = {
            layer: kind_of(layer)
            for layer in all_layers(model)
            if double
            and layer.variable_dtype in ("float32", "float64")
            and not is_rematerialized(layer)
        }
        self.kinds = {layer: kind for layer, kind in known.items() if kind}
        self._trainable = {id(v) for v in model.trainable_variables}
        self._calls = Calls()
        self.layers = list(self.kinds)
        self.shared = {}
        self._repeated = {}

    def without(self, layers: list[keras.Layer]) -> "Taps":
        """Return taps of all layers but some."""
        taps = copy.copy(self)
        taps.layers = [layer for layer in self.layers if layer not in layers]
        return taps

    def drop_all(self) -> None:
        """Tap no layer, where the gradients of single examples are formed for all weights."""
        self.layers, self.shared = [], {}

    def without_shared(self) -> "Taps":
        """Return taps of the layers in `layers` alone."""
        taps = copy.copy(self)
        taps.shared = {}
        return taps

    def with_shared(self) -> "Taps":
        """Return taps of the layers in `shared` too, whose outputs are repeated for each example.

        This is right where nothing of an example meets what was repeated for another.
        """
        taps = copy.copy(self)
        taps.layers, taps.shared, taps._repeated = [*self.layers, *self.shared], {}, self.shared
        return taps

    @contextlib.contextmanager
    def noting(self, scope: keras.StatelessScope, num_examples: int) -> Iterator[None]:
        """Drop the layers whose calls in an evaluation do not see all examples together.

        Args:
            scope: The `keras.StatelessScope` of the evaluation.
            num_examples: Integer, the examples of the evaluation.
        """
        with self._calls.noting(self.kinds, scope, num_examples):
            yield
        self.layers = [x for x in self.layers if self._calls.forms(x) and self._names(x)]
        self.shared = {
            x: self._calls.shared_form(x)
            for x in self.kinds
            if self._calls.shared_form(x) and self._names(x)
        }

    def coupled(self) -> bool:
        """Return whether a layer saw another first example in one evaluation than in another."""
        return self._calls.differ()

    def forget_evaluations(self) -> None:
        """Drop the arrays that were compared: the taps live as long as the model."""
        self._calls.forget_arrays()

    def weights(self, layer: keras.Layer) -> list[keras.Variable]:
        """Return the trainable variables of a tapped layer that its Gram matrix takes in."""
        return [getattr(layer, name) for name in self._names(layer)]

    def _names(self, layer: keras.Layer) -> list[str]:
        values = {name: getattr(layer, name, None) for name in self.kinds[layer].weights}
        taken = self._trainable - self._calls.read_elsewhere
        return [k for k, v in values.items() if isinstance(v, keras.Variable) and id(v) in taken]

    def _forms(self, layer: keras.Layer) -> list[Form]:
        return [self._repeated[layer]] if layer in self._repeated else self._calls.forms(layer)

    def probes(self, num_examples: int) -> list:
        """Return zeros for all taps, as a flat list of arrays."""
        probes = []
        for layer in self.layers:
            first, *others = self._forms(layer)
            if not others:
                with backend.float64_allowed():
                    probes.append(ops.zeros((num_examples, num_examples), "float64"))
                continue
            for form in (first, *others):
                probes += [
                    ops.zeros((num_examples, *shape), form.dtype)
                    for shape in (form.inputs, form.outputs)
                ]
        return probes

    def _of_layers(self, arrays: list) -> dict[keras.Layer, list]:
        """Return arrays for all taps by their layers."""
        arrays, counts = iter(arrays), {x: len(self._forms(x)) for x in self.layers}
        return {
            layer: [next(arrays) for _ in range(1 if count == 1 else 2 * count)]
            for layer, count in counts.items()
        }

    @contextlib.contextmanager
    def open(self, probes: list) -> Iterator[None]:
        """Tap the layers in a context.

        Args:
            probes: List of arrays, as `probes` returns them.

        Raises:
            CallsChangedError: At the end, if layers were called in another way than was noted.
        """
        of_layers, num_calls = self._of_layers(probes), collections.Counter()
        changed = set()

        def tapped_call(layer, call):
            forms, probes = self._forms(layer), of_layers[layer]

            def tapped(*args, **kwargs):
                inputs, outputs = args[0], call(*args, **kwargs)
                number, num_calls[layer] = num_calls[layer], num_calls[layer] + 1
                if layer in self._repeated:
                    count = probes[0].shape[0]
                    inputs = repeated(inputs, forms[0].inputs, count)
                    outputs = repeated(outputs, forms[0].outputs, count)
                if number >= len(forms) or not _fits(forms[number], inputs, outputs):
                    changed.add(layer)
                    return outputs
                if len(forms) > 1:
                    return noting_tap(inputs, outputs, *probes[2 * number : 2 * number + 2])
                return gram_tap(self._gram_of(layer), inputs, outputs, *probes)

            return tapped

        with calls_before_activations(self.layers, tapped_call):
            yield
        changed |= {x for x in self.layers if num_calls[x] != len(self._forms(x))}
        if changed:
            raise CallsChangedError(list(changed))

    def _gram_of(self, layer: keras.Layer) -> Callable[[list], Any]:
        """Return a function of inputs and output gradients of the calls: the Gram matrix."""
        parts_of, names = self.kinds[layer].parts_of(layer), self._names(layer)

        def gram(calls):
            with backend.float64_allowed():
                parts = [parts_of(*call) for call in calls]
                return sum(gram_of_calls([p[name]() for p in parts]) for name in names)

        return gram

    def grams(self, gradients: list) -> list:
        """Return the Gram matrix of each layer, `None` where no output depends on its weights.

        Args:
            gradients: List of arrays, the gradients by the probes.
        """
        return [
            found[0] if len(found) == 1 else self._gram_of_all(layer, found)
            for layer, found in self._of_layers(gradients).items()
        ]

    def _gram_of_all(self, layer: keras.Layer, found: list) -> Any:
        calls = [call for call in zip(found[::2], found[1::2]) if call[1] is not None]
        return self._gram_of(layer)(calls) if calls else None


def repeated(array: Any, shape: tuple, count: int) -> Any:
    """Return an array of some shape, or with an axis of one example before it, for each example."""
    return ops.broadcast_to(ops.reshape(array, (1, *shape)), (count, *shape))


def _fits(form: Form, inputs: Any, outputs: Any) -> bool:
    """Return whether a call is of a form as far as is known, in graphs not always to the end."""
    known = zip((*inputs.shape[1:], *outputs.shape[1:]), (*form.inputs, *form.outputs))
    same = len(inputs.shape) + len(outputs.shape) == len(form.inputs) + len(form.outputs) + 2
    return same and all(size is None or size == noted for size, noted in known)
