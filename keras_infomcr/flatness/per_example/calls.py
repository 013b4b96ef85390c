"""How the layers of a model are called in evaluations of its first examples."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.objective.replaced import replaced


class Form(NamedTuple):
    """What the inputs of a call and its outputs before the activation are made of.

    Attributes:
        inputs: Tuple, the shape of an example's inputs.
        outputs: Tuple, the shape of an example's outputs.
        dtype: String, the outputs' dtype.
        has_batch: Boolean, whether an axis of the examples comes first. Else all examples share
            what is computed, as with an embedding of positions.
    """

    inputs: tuple
    outputs: tuple
    dtype: str
    has_batch: bool

    @classmethod
    def of(cls, inputs: Any, outputs: Any, num_examples: int) -> "Form":
        """Return the form of a call in an evaluation of so many examples."""
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        has_batch = inputs.shape[0] == outputs.shape[0] == num_examples
        first = 1 if has_batch or inputs.shape[0] == outputs.shape[0] == 1 else 0
        return cls(tuple(inputs.shape[first:]), tuple(outputs.shape[first:]), dtype, has_batch)


class Calls:
    """Notes the calls of some layers in one evaluation after the other.

    Attributes:
        read_elsewhere: Set of the `id` of each variable that is read outside the calls of its
            layer, as a tied embedding is, or in calls of several layers: its gradients do not pass
            through the outputs of one layer alone.
    """

    def __init__(self):
        self.read_elsewhere = set()
        self._readers = {}
        self._evaluations = []  # for each layer a list of forms, or `None` for unusual calls
        self._arrays = []

    @contextlib.contextmanager
    def noting(
        self, layers: Iterable[keras.Layer], scope: keras.StatelessScope, num_examples: int
    ) -> Iterator[None]:
        """Note the calls of an evaluation.

        Args:
            layers: The layers.
            scope: The `keras.StatelessScope` of the evaluation.
            num_examples: Integer, the examples of the evaluation.
        """
        forms, seen = collections.defaultdict(list), collections.defaultdict(list)
        inside = [None]

        def noting_call(layer, call):
            def noted(*args, **kwargs):
                inside.append(layer)
                try:
                    outputs = call(*args, **kwargs)
                finally:
                    inside.pop()
                arrays = args[0] if args else None, outputs
                # What is traced may be a loop's body, which runs more often than it is called.
                known = not backend.is_traced(outputs) and all(map(_is_dense, arrays))
                # A second argument would be `training` or a mask.
                usual = known and len(args) == 1 and not kwargs.get("training")
                forms[layer].append(Form.of(*arrays, num_examples) if usual else None)
                of_all = known and all(array.shape[0] == num_examples for array in arrays)
                seen[layer].append([ops.convert_to_numpy(a) for a in arrays] if of_all else [])
                return outputs

            return noted

        value_of = scope.get_current_value

        def noting_value(variable):
            owner = inside[-1]
            own = owner is not None and any(variable is v for v in owner.variables)
            if not own or self._readers.setdefault(id(variable), owner) is not owner:
                self.read_elsewhere.add(id(variable))
            return value_of(variable)

        with (
            replaced(scope, "get_current_value", noting_value),
            calls_before_activations(layers, noting_call),
        ):
            yield
        self._evaluations.append(forms)
        self._arrays.append(seen)

    def forms(self, layer: keras.Layer) -> list[Form]:
        """Return the forms of the calls of a layer; an empty list if they are unusual."""
        first, *others = (forms[layer] for forms in self._evaluations)
        alike = None not in first and all(other == first for other in others)
        return first if alike and all(form.has_batch for form in first) else []

    def shared_form(self, layer: keras.Layer) -> Form | None:
        """Return the form of the one call of a layer, if all examples share what it computes."""
        forms = [form for forms in self._evaluations for form in forms[layer]]
        once = len(forms) == len(self._evaluations) > 1 and None not in forms
        # In an evaluation of one example, its axis might be the examples' axis.
        shared = once and not forms[-1].has_batch and len({form[:-1] for form in forms}) == 1
        return forms[-1] if shared else None

    def differ(self, one: int = 0, other: int = 1, row: int = 0) -> bool:
        """Return whether a layer saw another example in one evaluation than in another.

        Rounding is a thousand times smaller than the limit, the effect of a layer that couples
        examples is larger.

        Args:
            one: Integer, the number of an evaluation.
            other: Integer, the number of the other.
            row: Integer, the example's number in both.
        """
        if len(self._arrays) < 2:
            return False
        some, others = self._arrays[one], self._arrays[other]
        with np.errstate(invalid="ignore"):
            return any(
                np.max(np.abs(array[row] - same[row])) > 1e-3 * np.max(np.abs(array[row]))
                for layer in others
                for arrays, again in zip(some[layer], others[layer])
                for array, same in zip(arrays, again)
                if array.shape[1:] == same.shape[1:] and array[row].size
            )

    def forget_arrays(self) -> None:
        """Drop the arrays that `differ` compares: the taps live as long as the model."""
        self._arrays.clear()


def _is_dense(array: Any) -> bool:
    # Sparse inputs have no `ndim`.
    return getattr(array, "ndim", 0) > 0


@contextlib.contextmanager
def calls_before_activations(
    layers: Iterable[keras.Layer], replacement: Callable
) -> Iterator[None]:
    """Replace what the layers compute before their activations.

    Args:
        layers: The layers.
        replacement: Function of a layer and its `call` without activation. It returns a function
            that is called instead.
    """

    def whole(layer, call):
        def activated(*args, **kwargs):
            activation = getattr(layer, "activation", None)
            with replaced(layer, "activation", None):
                outputs = call(*args, **kwargs)
            return outputs if activation is None else activation(outputs)

        return activated

    with contextlib.ExitStack() as stack:
        for layer in layers:
            call = replacement(layer, layer.call)
            stack.enter_context(replaced(layer, "call", whole(layer, call)))
        yield
