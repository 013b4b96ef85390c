"""The logits of classes and their derivatives along the weights."""

import threading
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.example_values import (
    ExampleLoss,
    example_values,
    warn_of_inverted_probabilities,
)
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.objective import Objective


def logit_slopes(function: LossFunction, x: Any) -> "LogitSlopes":
    """Return the `LogitSlopes` that are kept for a model, its loss and a structure of inputs.

    Args:
        function: A `LossFunction`.
        x: Structure of NumPy arrays `[B, ...]`, inputs of the kind that it will be asked for.

    Raises:
        ValueError: If the loss is no cross-entropy of classes.
    """
    structure = keras.tree.map_structure(lambda a: f"{a.dtype}{a.shape[1:]}", x)
    key = "logit_slopes", repr(structure), function.bearer
    slopes = compiled_for(function.model, key, lambda: LogitSlopes(function, x))
    if slopes.inverts:
        warn_of_inverted_probabilities()
    return slopes


class LogitSlopes:
    """The logits z(w) of examples, and dz((1 + t) w) / dt at t = 0.

    Args:
        function: As for `logit_slopes`.
        x: As for `logit_slopes`.

    Attributes:
        kind: `"categorical"` or `"binary"`, the cross-entropy that the logits are for.
        inverts: Boolean, whether the logits are made of probabilities.

    Raises:
        ValueError: As `logit_slopes`.
    """

    def __init__(self, function: LossFunction, x: Any):
        self._model = model = function.model
        self._objective = Objective(model)
        self._lock = threading.Lock()
        first = keras.tree.map_structure(lambda a: ops.convert_to_tensor(a[:1]), x)
        self._outputs, logits = self._predict(*function.point(), first)
        self._values = example_values(function.bearer, self._outputs, logits, False, 1.0)
        if isinstance(self._values, ExampleLoss):
            raise ValueError(
                "The loss must be one softmax cross-entropy of classes, or one sigmoid "
                f"cross-entropy of one output. Received: loss={function.bearer.loss!r}. Pass "
                "`loss=...` to the measure if the outputs mean probabilities or logits."
            )
        self.kind = self._values.kind
        self.inverts = self._values.inverts
        eagerly = model.run_eagerly
        self._logits_of = self._logits if eagerly else backend.compiled(self._logits)
        self._products = backend.hessian_vector_products(self._weighted_sum, compiled=not eagerly)

    def __call__(self, at: tuple, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of a batch and their derivatives, float64 arrays `[B, K]`.

        Args:
            at: Tuple of the lists of arrays of the weights and of the state.
            x: Structure of NumPy arrays `[B, ...]`.
        """
        device = backend.devices(self._model)[0]
        inputs = keras.tree.map_structure(ops.convert_to_tensor, x)
        logits = backend.on_device(device, self._logits_of, *at, inputs)
        # In the sum of v_i z_i((1 + t) w) the second derivative by v_i and t is that of z_i by t.
        point = [ops.zeros_like(logits), ops.zeros((), logits.dtype)]
        vectors = [ops.zeros((1, *logits.shape), logits.dtype), ops.ones((1,), logits.dtype)]
        products = backend.on_device(device, self._products, point, vectors, *at, inputs)
        found = [ops.convert_to_numpy(a).astype("float64") for a in (logits, products[0][0])]
        return found[0], found[1]

    def classes(self, y: Any) -> np.ndarray:
        """Return labels as the numbers of their classes, or as signs of one output."""
        return self._values.labels(y, self._outputs)

    def _weighted_sum(self, point: list, weights: list, state: list, x: Any) -> Any:
        factors, t = point
        logits = self._logits([w * (1 + ops.cast(t, w.dtype)) for w in weights], state, x)
        return ops.sum(factors * logits)

    def _logits(self, weights: list, state: list, x: Any) -> Any:
        logits = self._values.class_logits(*self._predict(weights, state, x))
        return ops.reshape(logits, (-1, logits.shape[-1]))

    def _predict(self, weights: list, state: list, x: Any) -> tuple:
        with self._lock, self._objective.at(weights, state, False) as (predict, _):
            return predict_with_logits(self._model, predict, x)
