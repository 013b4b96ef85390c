"""A step of the Langevin chain of Entropy-SGD."""

import math
import operator
from collections.abc import Callable
from typing import Any


def langevin_step(
    displacements: list,
    velocities: list,
    gradients: list,
    draws: list,
    *,
    step_size: float,
    gamma: Any,
    noise: float,
    momentum: float,
    multiply: Callable = operator.mul,
) -> tuple[list, list]:
    """Move weights x' = x + u by Langevin dynamics about x, with Nesterov's momentum.

        v <- momentum v + g
        u <- u - step_size (g + momentum v + gamma u) + sqrt(step_size) noise N

    Neither the force gamma u nor the noise enters the velocity v, as in the authors' codes.

    On a loss of curvature a and without momentum, u has the stationary variance

        noise^2 / ((a + gamma) (2 - step_size (a + gamma)))

    Reference: Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", ICLR
    2017, Algorithm 1 (https://arxiv.org/abs/1611.01838).

    Args:
        displacements: List of arrays, u.
        velocities: List of arrays, v.
        gradients: List of arrays and `None`, g, the gradient of the loss at x'. Where it is `None`
            nothing moves.
        draws: List of standard normal arrays, N, or of `None` for no noise.
        step_size: Float, greater than 0.
        gamma: Float or scalar array, the strength of the force.
        noise: Float, 0 or greater.
        momentum: Float from 0, less than 1.
        multiply: Function `(scalar, array) -> array`. Defaults to `scalar * array`.

    Returns:
        Tuple of the new displacements and the new velocities.
    """

    def moved(u, v, g, z):
        if g is None:
            return u, v
        v = momentum * v + g
        new = u - step_size * (g + momentum * v + multiply(gamma, u))
        return new if z is None else new + math.sqrt(step_size) * noise * z, v

    pairs = [moved(*each) for each in zip(displacements, velocities, gradients, draws)]
    return [u for u, _ in pairs], [v for _, v in pairs]
