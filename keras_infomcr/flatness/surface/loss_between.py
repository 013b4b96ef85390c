"""The loss on the straight line between two models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.loss.zero_one_error import LossAndError
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.surface.evaluated import losses_and_errors
from keras_infomcr.flatness.surface.same_architecture import paired_weights


@dataclasses.dataclass(frozen=True)
class LossBetween:
    """What `loss_between` returns. n is the number of points.

    Attributes:
        coordinates: Array `[n]`, ascending from 0, the model, to 1, the other one.
        losses: Array `[n]`, the loss at each point.
        errors: Array `[n]`, the 0-1 error at each point, a fraction. NaN if the loss is no
            cross-entropy of one output.
        barrier: Float, at least 0: how far the loss rises above the straight line between its
            values at the ends, at most over the points.
        error_barrier: Float, the same of the 0-1 error.
    """

    coordinates: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    barrier: float
    error_barrier: float


def loss_between(
    model: keras.Model,
    other: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_points: int = 25,
    reestimate: bool = True,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> LossBetween:
    """Evaluate the loss and the 0-1 error on the straight line between two models.

        L((1 - a) w + a w'),    barrier = max_a L(a) - ((1 - a) L(0) + a L(1)),    0 <= a <= 1

    All weights are interpolated, frozen ones too. `plot.loss_between` draws the result. Networks
    whose hidden units are permuted compute the same function and have, as a rule, a barrier
    between them: one does not show that two minima are separate valleys. Both models are left as
    they are.

    Reference: Goodfellow, Vinyals and Saxe, "Qualitatively characterizing neural network
    optimization problems", ICLR 2015 (https://arxiv.org/abs/1412.6544); the barrier: Entezari,
    Sedghi, Saukh and Neyshabur, "The Role of Permutation Invariance in Linear Mode Connectivity of
    Neural Networks", ICLR 2022, Definition 3.1 (https://arxiv.org/abs/2110.06296).

    Args:
        model: As for `hessian_trace`. Its loss is the one that is evaluated.
        other: `keras.Model` of the same architecture, built; it needs no loss. The layers must
            agree in class, order and shapes. Names, and what is trainable, may differ.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_points: Integer, at least 3, both ends included. Defaults to 25.
        reestimate: Boolean, whether batch normalisation gets at each point, the ends included, the
            statistics that all the data together give it there, in another pass; training data
            are meant then. Otherwise its moving statistics are interpolated like weights, and are
            wrong between the ends. Defaults to `True`.
        num_examples: As for `loss_surface`.
        chunk_size: As for `loss_surface`.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.
        verbose: As for `loss_surface`.

    Returns:
        A `LossBetween`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`, and if the models are not of one architecture.

    Example:

    ```python
    result = loss_between(model, other, x_train, y_train, num_examples=500, seed=0)
    print(result.barrier)
    ```
    """
    validation.integer(minimum=3, num_points=num_points)
    validation.boolean(reestimate=reestimate)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossAndError(model, loss)
    others = paired_weights(model, other)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    coordinates = np.linspace(0, 1, num_points)
    line = _line(function, others)
    points = map(line, coordinates.tolist())
    losses, errors = losses_and_errors(function, data, points, num_points, reestimate, verbose)
    barriers = (_barrier(coordinates, values) for values in (losses, errors))
    return LossBetween(coordinates, losses, errors, *barriers)


def _line(function: LossAndError, others: dict[int, keras.Variable]) -> Callable:
    """Return the function of a coordinate that gives the weights, a vector, and the state there."""
    variables = function.model.trainable_variables
    weights, state = function.weights(), function.state()
    rise = function.vector([ops.copy(others[id(v)]) for v in variables]) - weights
    # Neither the states of random generators nor integers, which have no part in the loss.
    rises = {
        k: ops.cast(ops.copy(others[id(v)]), v.dtype) - state[k]
        for k, v in enumerate(function.model.non_trainable_variables)
        if id(v) in others and "float" in v.dtype
    }

    def at(coordinate):
        there = [s + coordinate * rises[k] if k in rises else s for k, s in enumerate(state)]
        return weights + function.dtype.type(coordinate) * rise, there

    return at


def _barrier(coordinates: np.ndarray, values: np.ndarray) -> float:
    chord = values[0] + coordinates * (values[-1] - values[0])
    # The last point is on it by definition, but for rounding.
    return float(np.max((values - chord)[:-1]))
