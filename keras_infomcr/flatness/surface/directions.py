"""Directions through the weights of a model: random ones, and those that a user gives."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import euclidean_norm
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.surface.filters import filter_axes, scaled
from keras_infomcr.flatness.surface.same_architecture import paired_weights


def directions_of(
    directions: Any, function: LossFunction, data: Iterable, normalize: str | None, seed: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return one or two directions, an array `[d, W]`, with a name of each.

    Args:
        directions: As for `loss_surface`.
        function: The `LossFunction` of the model.
        data: Iterable of batches `(x, y)` of NumPy arrays.
        normalize: As for `loss_surface`.
        seed: Integer.

    Raises:
        ValueError: If there are more than two, or one is zero, not finite or of another shape, or
            none of what can be a direction.
    """
    if isinstance(directions, (int, np.integer)) and not isinstance(directions, bool):
        validation.integer(minimum=1, maximum=2, directions=directions)
        found = _random_directions(function, directions, normalize, seed)
        names = [f"random direction {k + 1}" for k in range(directions)]
    else:
        if not isinstance(directions, (list, tuple, np.ndarray)) or len(directions) not in (1, 2):
            raise ValueError(
                "`directions` must be 1, 2 or a sequence of one or two directions. Received: "
                f"directions={directions!r}. Put a single direction into a list."
            )
        found = [_given_direction(d, function, data) for d in directions]
        names = [_name(d, k + 1) for k, d in enumerate(directions)]
    for name, direction in zip(names, found):
        if not np.isfinite(direction).all() or not direction.any():
            raise ValueError(
                "Each of `directions` must be finite, and move some weight. Received: "
                f"{name}, of norm {euclidean_norm(direction):.3g}."
            )
    return np.stack(found), tuple(names)


def _random_directions(
    function: LossFunction, number: int, normalize: str | None, seed: int
) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    variables, axes = function.model.trainable_variables, filter_axes(function.model)
    weights = [ops.convert_to_numpy(ops.copy(v)).astype("float64") for v in variables]
    directions = []
    for _ in range(number):
        # Drawn for all weights, also those left still, in one row: models of one architecture
        # have the same draws, whatever is scaled and how.
        arrays = [generator.standard_normal(w.shape) for w in weights]
        parts = [scaled(d, w, a, normalize) for d, w, a in zip(arrays, weights, axes)]
        directions.append(function.vector(parts))
    return directions


def _given_direction(direction: Any, function: LossFunction, data: Iterable) -> np.ndarray:
    if isinstance(direction, str):
        validation.one_of("gradient", direction=direction)
        _, gradient = function.gradient(data, function.point())
        return gradient / (euclidean_norm(gradient) or 1.0)
    if isinstance(direction, keras.Model):
        others = paired_weights(function.model, direction)
        there = [ops.copy(others[id(v)]) for v in function.model.trainable_variables]
        return function.vector(there) - function.weights()
    shapes = [tuple(v.shape) for v in function.model.trainable_variables]
    if isinstance(direction, (list, tuple)) and [np.shape(a) for a in direction] == shapes:
        return function.vector(direction)
    if np.shape(direction) == (function.size,):
        return np.asarray(direction, function.dtype)
    kind = getattr(direction, "shape", type(direction))
    raise ValueError(
        "A direction must be an array of as many numbers as there are trainable weights, a list of "
        "arrays like the trainable variables, a model of the same architecture, or 'gradient'. "
        f"Received: {kind}, where there are {function.size} trainable weights, of shapes {shapes}"
    )


def _name(direction: Any, number: int) -> str:
    if isinstance(direction, str):
        return "the gradient"
    return (
        "the line to a model" if isinstance(direction, keras.Model) else f"given direction {number}"
    )
