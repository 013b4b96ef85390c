"""How the layers of a model are called in evaluations of its first examples."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.replaced import replaced


class Form(NamedTuple):
    """What the inputs of a call and its outputs before the activation are made of.

    Attributes:
        inputs: Tuple, the shape of an example's inputs.
        outputs: Tuple, the shape of an example's outputs.
        dtype: String, the outputs' dtype.
    """

    inputs: tuple
    outputs: tuple
    dtype: str

    @classmethod
    def of(cls, inputs: Any, outputs: Any) -> "Form":
        """Return the form of a call."""
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        return cls(tuple(inputs.shape[1:]), tuple(outputs.shape[1:]), dtype)


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
        self._first_rows = []

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
        forms, rows = collections.defaultdict(list), collections.defaultdict(list)
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
                of_all = not backend.is_traced(outputs) and all(
                    _has_rows(array, num_examples) for array in arrays
                )
                # A second argument would be `training` or a mask.
                usual = of_all and len(args) == 1 and not kwargs.get("training")
                forms[layer].append(Form.of(*arrays) if usual else None)
                rows[layer].append([ops.convert_to_numpy(a[0]) for a in arrays] if of_all else [])
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
        self._first_rows.append(rows)

    def forms(self, layer: keras.Layer) -> list[Form]:
        """Return the forms of the calls of a layer; an empty list if they are unusual."""
        first, *others = (forms[layer] for forms in self._evaluations)
        return [] if None in first or any(other != first for other in others) else first

    def coupled(self) -> bool:
        """Return whether a layer saw another first example in one evaluation than in another.

        Rounding is a thousand times smaller than the limit, the effect of a layer that couples
        examples is larger.
        """
        first, *others = self._first_rows
        with np.errstate(invalid="ignore"):
            return any(
                np.max(np.abs(array - same)) > 1e-3 * np.max(np.abs(array))
                for rows in others
                for layer in rows
                for arrays, again in zip(first[layer], rows[layer])
                for array, same in zip(arrays, again)
                if array.shape == same.shape and array.size
            )

    def forget_arrays(self) -> None:
        """Drop the arrays that `coupled` compares: the taps live as long as the model."""
        self._first_rows.clear()


def _has_rows(array: Any, count: int) -> bool:
    # Sparse inputs have no `ndim`.
    return getattr(array, "ndim", 0) > 0 and array.shape[0] == count


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
