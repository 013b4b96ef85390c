"""How eigenvalues of a Hessian are sought: in which order, from where, how exactly."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.lanczos import top_eigenvalues
from keras_infomcr.flatness.hessian.products import HessianProducts
from keras_infomcr.flatness.running.checks import warn


@dataclasses.dataclass(frozen=True)
class EigenvalueSearch:
    """A search for eigenvalues of Hessians.

    Args:
        count: Integer, at least 1, the number of eigenvalues.
        order: Function of an array of ascending eigenvalues that returns their indices, those
            that are sought first.
        tolerance: Float, greater than 0, as for `hessian_top_eigenvalues`.
        max_products: Integer, at least `count`.
        floor: Float, as for `core.lanczos.top_eigenvalues`.
        starts: Array `[n, W]` of vectors to start near, or `None`.
        vectors: Boolean, whether to keep the eigenvectors.
    """

    count: int
    order: Callable[[np.ndarray], np.ndarray]
    tolerance: float
    max_products: int
    floor: float
    starts: np.ndarray | None = None
    vectors: bool = False

    def __post_init__(self):
        validation.positive(tolerance=self.tolerance)
        validation.integer(minimum=self.count, max_products=self.max_products)

    def __call__(self, hessian: HessianProducts) -> tuple[np.ndarray, float, np.ndarray | None]:
        """Return the eigenvalues, the largest of their relative errors, and vectors or `None`."""
        accuracy = self.tolerance, self.max_products, self.floor
        start = hessian.direction(self.starts)
        values, error, vectors = top_eigenvalues(
            hessian.product, start, self.count, self.order, *accuracy
        )
        return values, error, vectors if self.vectors else None

    def warn_of_errors(self, errors: list[float]):
        """Warn of eigenvalues that have not converged."""
        worst = max((error for error in errors if error > self.tolerance), default=None)
        if worst:
            warn(
                f"The eigenvalues have not converged: they may be wrong by {worst:.1g} of their "
                f"size. Received: tolerance={self.tolerance}, max_products={self.max_products}. "
                "Raise one of them."
            )


def from_both_ends(values: np.ndarray) -> np.ndarray:
    """Return the indices of ascending eigenvalues: the last, the first, the last but one, ..."""
    from_below = np.arange(len(values))
    return np.stack([from_below[::-1], from_below], axis=1).ravel()[: len(values)]


def by_size(values: np.ndarray) -> np.ndarray:
    """Return the indices of eigenvalues, those of the largest size first."""
    return np.argsort(-np.abs(values))


def check_arguments(num_eigenvalues: int, vectors: bool, starts: Any, size: int, num_trials: int):
    """Refuse arguments of `Hessian.top_eigenvalues` that do not fit each other or the weights."""
    validation.integer(minimum=1, num_eigenvalues=num_eigenvalues)
    validation.boolean(vectors=vectors)
    if num_eigenvalues > size:
        raise ValueError(
            "`num_eigenvalues` must not exceed the number of weights. "
            f"Received: num_eigenvalues={num_eigenvalues}, {size} weights"
        )
    if vectors and num_trials > 1:
        raise ValueError(
            f"`vectors=True` needs a single Hessian. Received: num_trials={num_trials}. Use "
            "`num_trials=1`, or `num_examples=None` for all of the data."
        )
    if starts is None:
        return
    if np.ndim(starts) != 2 or np.shape(starts)[1] != size or not np.isfinite(starts).all():
        raise ValueError(
            "`starts` must be finite vectors with an entry for each trainable weight, an array of "
            f"the shape (n, {size}). Received: starts={starts!r} of shape {np.shape(starts)}"
        )
