"""The spectral radius of the Hessian: the largest curvature, by its size."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.lanczos import top_eigenvalues
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import measure_hessian
from keras_infomcr.flatness.running.checks import warn


@dataclasses.dataclass(frozen=True)
class SpectralRadius(Estimate):
    """What `hessian_spectral_radius` returns.

    Attributes:
        value: Float, the largest |eigenvalue|, averaged over the trials if there are any.
        stderr: Float, its standard error over the trials. NaN without trials.
        samples: Array, one number a trial.
        largest: Float, the largest eigenvalue, averaged likewise.
        smallest: Float, the smallest eigenvalue, averaged likewise; negative, as a rule, unless
            the loss is convex.
    """

    largest: float
    smallest: float


@dataclasses.dataclass(frozen=True)
class TopEigenvalues(Estimate):
    """What `hessian_top_eigenvalues` returns.

    Attributes:
        value: Float, the first of the eigenvalues, averaged over the trials if there are any.
        stderr: Float, its standard error over the trials. NaN without trials.
        samples: Array `[T, k]`, the eigenvalues of each trial; T is 1 without trials.
        eigenvalues: Array `[k]`, the means over the trials of the first, of the second by size
            and so on, with their signs.
    """

    eigenvalues: np.ndarray


def hessian_spectral_radius(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    tolerance: float = 0.01,
    max_products: int = 100,
    **settings: Any,
) -> SpectralRadius:
    """Compute the spectral radius of the Hessian of the loss by the weights, and both extremes.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192); by Lanczos iterations
    (Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems", 2000).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        tolerance: Float, greater than 0. There is an eigenvalue within this fraction of each of
            the two extremes, or of a tenth of the spectral radius where that is more. The error
            of one that is well apart from other eigenvalues is, as a rule, of the order of the
            square of that fraction. Defaults to 0.01.
        max_products: Integer, at least 2. Hessian-vector products at most, of all the data or a
            trial; some 10 to 30 are usual, and `hessian_top_eigenvalues(k=1)`, without the other
            extreme, takes 5 to 10. If they do not suffice, a warning says so. Defaults to 100.
        **settings: `num_examples`, `num_trials`, `batch_size`, `training`, `seed` and `verbose`,
            as for `hessian_trace`.

    Returns:
        A `SpectralRadius`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_spectral_radius(model, x_train, y_train, num_examples=100, seed=0)
    print(result.value, result.smallest, result.largest)
    ```
    """

    def both_ends(values):
        from_below = np.arange(len(values))
        return np.stack([from_below[::-1], from_below], axis=1).ravel()[: len(values)]

    # An edge near zero, which nothing but many products tells from zero, is not worth them.
    accuracy = tolerance, max_products, 0.1
    extremes = _eigenvalues(model, x, y, 2, both_ends, accuracy, settings)
    radii = np.abs(extremes).max(axis=1)
    largest, smallest = extremes.mean(axis=0)[[0, -1]]
    result = Estimate.of(radii)
    return SpectralRadius(result.value, result.stderr, radii, float(largest), float(smallest))


def hessian_top_eigenvalues(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    k: int = 10,
    tolerance: float = 0.01,
    max_products: int = 200,
    **settings: Any,
) -> TopEigenvalues:
    """Compute the eigenvalues of largest size of the Hessian of the loss by the weights.

    Of a repeated eigenvalue one copy may be found only.

    Reference: Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems", SIAM Journal on Matrix Analysis and Applications, 2000.

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        k: Integer, from 1 to the number of weights. 2 k + 20 vectors like the weights are kept,
            and 4 k + 40 for a moment. Defaults to 10.
        tolerance: Float, greater than 0. There is an eigenvalue within this fraction of each, or
            of a hundredth of the largest where that is more. (Lanczos iterations may, rarely,
            miss one between them.) Defaults to 0.01.
        max_products: Integer, at least k; as for `hessian_spectral_radius`. Defaults to 200.
        **settings: As for `hessian_spectral_radius`.

    Returns:
        A `TopEigenvalues`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_top_eigenvalues(model, x_train, y_train, k=5, num_examples=100)
    ```
    """
    validation.integer(minimum=1, k=k)

    def by_size(values):
        return np.argsort(-np.abs(values))

    samples = _eigenvalues(model, x, y, k, by_size, (tolerance, max_products, 0.01), settings)
    first = Estimate.of(samples[:, 0])
    return TopEigenvalues(first.value, first.stderr, samples, samples.mean(axis=0))


def _eigenvalues(model, x, y, count, order, accuracy, settings):
    """Return the eigenvalues of each trial, an array `[T, count]`."""
    tolerance, max_products, _ = accuracy
    validation.positive(tolerance=tolerance)
    validation.integer(minimum=count, max_products=max_products)

    def eigenvalues(hessian):
        if count > max(hessian.size, 2):
            raise ValueError(
                "`k` must not exceed the number of weights. "
                f"Received: k={count}, {hessian.size} weights"
            )
        return top_eigenvalues(hessian.product, hessian.direction(), count, order, *accuracy)

    trials = measure_hessian(eigenvalues, model, x, y, max_products, **settings)
    worst = max((error for _, error in trials if error > tolerance), default=None)
    if worst:
        warn(
            f"The eigenvalues have not converged: they may be wrong by {worst:.1g} of their size. "
            f"Received: tolerance={tolerance}, max_products={max_products}. Raise one of them."
        )
    return np.array([values for values, _ in trials])
