"""The loss on a line or a plane through the weights of a model."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.loss.zero_one_error import LossAndError
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.surface.directions import directions_of
from keras_infomcr.flatness.surface.evaluated import losses_and_errors


@dataclasses.dataclass(frozen=True)
class LossSurface:
    """What `loss_surface` returns. n is the number of points of each direction.

    Attributes:
        coordinates: Array `[n]`, how many times a direction is added, ascending; the same for both
            directions.
        losses: Array `[n]` for one direction, `[n, n]` for two: `losses[i, j]` is the loss at
            w + coordinates[i] directions[0] + coordinates[j] directions[1].
        errors: Array like `losses`, the 0-1 error, a fraction. NaN if the loss is no cross-entropy
            of one output.
        directions: Array `[1, W]` or `[2, W]`, the directions, in the order of
            `model.trainable_variables`. Given to another call, they show other data, or a finer
            grid, on the same slice.
        names: Tuple of strings, what the directions are.
        normalize: String or `None`, how random directions are normalised; `None` for given ones.
        seed: Integer, the seed of all draws: the one given, or the one drawn in its place.
    """

    coordinates: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    directions: np.ndarray
    names: tuple[str, ...]
    normalize: str | None
    seed: int


def loss_surface(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    directions: int | Sequence[Any] = 2,
    span: float | tuple[float, float] = 1.0,
    num_points: int = 25,
    normalize: str | None = "filter",
    reestimate: bool = False,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> LossSurface:
    """Evaluate the loss and the 0-1 error on a line or a plane through the weights.

        L(w + a d)    or    L(w + a d + b e)

    `plot.loss_surface` draws the result. A slice is an illustration, no measure: it shows one or
    two of W directions, and another seed shows others. The model is left as it is.

    A random direction d has standard normal entries. Normalised by filters, each filter d_i becomes
    d_i ||w_i|| / ||d_i||, so that networks whose filters differ in scale alone have the same
    picture where the scale does not matter, as before batch normalisation. A filter is what makes
    one output: the last axis of most kernels counts filters; each pair of input and multiplier of a
    depthwise kernel is one, and so is a row of an embedding. Biases, parameters of normalisations
    and all else of one axis stay as they are, normalised or not. Two random directions are nearly
    orthogonal, because there are many weights; nothing makes them so.

    Reference: Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural
    Nets", NeurIPS 2018, Section 4 (https://arxiv.org/abs/1712.09913).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        directions: 1 or 2: so many random directions. Or a sequence of one or two directions, each
            an array `[W]`, such as an eigenvector of the Hessian; a list of arrays like
            `model.trainable_variables`; another model of the same architecture, which lies at
            the coordinate 1; or `"gradient"`, of the loss at w, scaled to the norm 1. Defaults
            to 2.
        span: Float, greater than 0: coordinates run from `-span` to `span`. Or a tuple `(low,
            high)`. Defaults to 1.0, where a random direction that is normalised reaches as far as w
            is long.
        num_points: Integer, at least 2, of each direction. With an odd number the model itself is
            a point of a symmetric span. Defaults to 25.
        normalize: `"filter"`, `"layer"` (each variable as one filter), `"weight"` (each number
            d_i becomes d_i |w_i|) or `None`, for random directions. Given ones are taken as they
            are. Defaults to `"filter"`.
        reestimate: Boolean, whether batch normalisation gets at each point the statistics that all
            the data together give it there, in another pass. Otherwise it keeps the model's moving
            statistics, as in the reference, which do not fit the weights of other points. Set
            it for directions to other models. Defaults to `False`.
        num_examples: Integer, at least 1: so many examples are drawn; if the data come in
            batches, the first are read. Or `None`: all examples are evaluated. Defaults to `None`.
        chunk_size: Integer, at least 1: examples that go through the model together. Defaults
            to 128.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of all draws. Defaults to one that is drawn, and returned.
        verbose: 0 or 1. With 1, a progress bar counts the points, each of which takes a forward
            pass over the data. Defaults to 0.

    Returns:
        A `LossSurface`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`, and if a direction does not fit the weights, or is zero.

    Example:

    ```python
    result = loss_surface(model, x_train, y_train, num_examples=500, seed=0)
    plot.loss_surface(result)
    ```
    """
    low, high = _ends(span)
    validation.integer(minimum=2, num_points=num_points)
    if normalize is not None:
        validation.one_of("filter", "layer", "weight", normalize=normalize)
    validation.boolean(reestimate=reestimate)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else int(seed)
    function = LossAndError(model, loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    vectors, names = directions_of(directions, function, data, normalize, seed)
    coordinates = np.linspace(low, high, num_points)
    weights, state = function.weights(), function.state()
    shape = (num_points,) * len(vectors)
    # The weights of one point at a time are in memory.
    points = (
        (weights + np.asarray(steps, function.dtype) @ vectors, state)
        for steps in itertools.product(coordinates, repeat=len(vectors))
    )
    size = num_points ** len(vectors)
    found = losses_and_errors(function, data, points, size, reestimate, verbose)
    losses, errors = (values.reshape(shape) for values in found)
    normalize = normalize if isinstance(directions, (int, np.integer)) else None
    return LossSurface(coordinates, losses, errors, vectors, names, normalize, seed)


def _ends(span: Any) -> tuple[float, float]:
    """Return the least and the greatest coordinate."""
    if not isinstance(span, (tuple, list)):
        validation.positive(span=span)
        return -span, span
    if len(span) != 2 or not np.isfinite(span).all() or not span[0] < span[1]:
        raise ValueError(
            "`span` must be a number greater than 0, or two finite numbers `(low, high)`, the "
            f"first the smaller. Received: span={span!r}"
        )
    return span[0], span[1]
