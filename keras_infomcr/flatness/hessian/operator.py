"""The Hessian of a model's loss, an object that a user can keep."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import euclidean_norm, unit_of
from keras_infomcr.core.lanczos import top_eigenvalues, tridiagonal
from keras_infomcr.core.quadrature import blurred_density, grid_for, quadrature
from keras_infomcr.core.trace import hutch_plus_plus, hutchinson
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.hessian.products import HessianProducts, check_size
from keras_infomcr.flatness.hessian.results import (
    SpectralDensity,
    SpectralRadius,
    TopEigenvalues,
    mean_estimate,
)
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling, warn
from keras_infomcr.flatness.running.progress import progress_bar


class Hessian:
    """The Hessian of the loss of a model by its weights.

    The object is for several measures of the same data: `hessian_trace(model, x, y, ...)` is short
    for `Hessian(model, x, y, ...).trace()`, and so are the others. Each call of a method sees the
    model's weights, statistics and seeds as they are then, so that one object can be kept while
    the model trains. The data, and the examples of the trials, stay the same.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of all draws. With an integer each call of a method draws the
            same. Defaults to new draws each time.
        verbose: As for `hessian_trace`.

    Attributes:
        model: The model.
        size: Integer, W, the number of trainable weights: the Hessian is of the shape `[W, W]`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    hessian = Hessian(model, x_train, y_train, num_examples=100, seed=0)
    print(hessian.trace().value, hessian.top_eigenvalues(num_eigenvalues=5).eigenvalues)
    along_gradient = gradient @ hessian.product(gradient) / (gradient @ gradient)
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        num_examples: int | None = None,
        num_trials: int = 10,
        chunk_size: int = 128,
        training: bool = False,
        loss: Any = None,
        seed: int | None = None,
        verbose: int = 0,
    ):
        check_sampling(num_examples, num_trials, chunk_size, seed, verbose)
        validation.boolean(training=training)
        self.model = model
        self._given = training, loss
        self._loss()  # checks the model
        self._trials = trial_batches(x, y, num_examples, num_trials, chunk_size, seed)
        self._seed = seed
        self._verbose = verbose

    @property
    def size(self) -> int:
        """The number of trainable weights, W."""
        return self._loss().size

    def product(self, vector: np.ndarray) -> np.ndarray:
        """Return the product H v with a vector; over trials, the mean of their products.

        Args:
            vector: Array `[W]`: an entry for each weight in the order of
                `model.trainable_variables`, each of them flattened row by row, as by
                `np.concatenate([np.ravel(v) for v in model.trainable_variables])`.

        Returns:
            Array `[W]` in the same order, in float64 if a weight is, else in float32.

        Raises:
            ValueError: If the vector is of another shape.
        """
        vector = np.asarray(vector)
        if vector.shape != (self.size,):
            raise ValueError(
                f"`vector` must have an entry for each trainable weight, the shape ({self.size},). "
                f"Received: vector of shape {vector.shape}"
            )
        # Without the warnings of a measure: that a product is zero says nothing of the curvature.
        products, _ = self._over_trials(self._loss(), lambda hessian: hessian.product(vector), 1)
        return np.mean(products, axis=0)

    def trace(self, *, num_products: int = 30, method: str = "hutch++") -> Estimate:
        """Estimate the trace, as `hessian_trace` does; its arguments are explained there."""
        validation.one_of("hutchinson", "hutch++", method=method)
        validation.integer(minimum=2 if method == "hutchinson" else 6, num_products=num_products)

        def trace(hessian):
            if method == "hutchinson":
                return hutchinson(hessian.products, hessian.probes(num_products))
            # A sketch takes two products: one for the range, one for the trace within it.
            sketches = hessian.probes(num_products // 3)
            probes = hessian.probes(num_products - 2 * (num_products // 3))
            return hutch_plus_plus(hessian.products, sketches, probes)

        return mean_estimate(self._measured(trace, num_products))

    def frobenius_norm(self, *, num_products: int = 30) -> Estimate:
        """Estimate the Frobenius norm, as `hessian_frobenius_norm` does, which explains it."""
        validation.integer(minimum=2, num_products=num_products)

        def norms(hessian):
            products = map(hessian.products, hessian.probes(num_products))
            return np.array([euclidean_norm(p) for some in products for p in some])

        trials = self._measured(norms, num_products)
        # The squares of very small or very large curvatures would vanish or overflow.
        unit = unit_of(trials)
        square = mean_estimate([(trial / unit) ** 2 for trial in trials])
        norm = np.sqrt(square.value)
        # The error of a root is half the relative error of the square.
        stderr = square.stderr / (2 * norm) if norm else square.stderr
        return Estimate(float(unit * norm), float(unit * stderr), unit * np.sqrt(square.samples))

    def spectral_radius(
        self, *, tolerance: float = 0.01, max_products: int = 100
    ) -> SpectralRadius:
        """Compute the spectral radius, as `hessian_spectral_radius` does, which explains it."""
        # An edge near zero, which nothing but many products tells from zero, is not worth them.
        extremes = self._eigenvalues(2, _from_both_ends, tolerance, max_products, floor=0.1)
        largest, smallest = (float(extremes[:, k].mean()) for k in (0, -1))
        radii = np.abs(extremes).max(axis=1)
        return SpectralRadius.of(radii, largest=largest, smallest=smallest)

    def top_eigenvalues(
        self, *, num_eigenvalues: int = 10, tolerance: float = 0.01, max_products: int = 200
    ) -> TopEigenvalues:
        """Compute the largest eigenvalues, as `hessian_top_eigenvalues` does, which explains it."""
        validation.integer(minimum=1, num_eigenvalues=num_eigenvalues)
        if num_eigenvalues > self.size:
            raise ValueError(
                "`num_eigenvalues` must not exceed the number of weights. "
                f"Received: num_eigenvalues={num_eigenvalues}, {self.size} weights"
            )
        samples = self._eigenvalues(num_eigenvalues, _by_size, tolerance, max_products, floor=0.01)
        first = Estimate.of(samples[:, 0])
        return TopEigenvalues(first.value, first.stderr, samples, samples.mean(axis=0))

    def spectral_density(
        self, *, num_probes: int = 3, num_steps: int = 50, width: float | None = None
    ) -> SpectralDensity:
        """Estimate the spectral density, as `hessian_spectral_density` does, which explains it."""
        validation.integer(minimum=1, num_probes=num_probes, num_steps=num_steps)
        if width is not None:
            validation.positive(width=width)

        def quadratures(hessian):
            probes = (probe for some in hessian.probes(num_probes) for probe in some)
            return [quadrature(tridiagonal(hessian.product, p, num_steps)) for p in probes]

        trials = self._measured(quadratures, num_probes * num_steps)
        nodes = np.concatenate([nodes for trial in trials for nodes, _ in trial])
        # A single node, or several that coincide, have no range to take a width from.
        width = width or float(np.ptp(nodes)) / 100 or abs(float(nodes[0])) / 100 or 1.0
        grid = grid_for(nodes, width)
        densities = np.array(
            [[blurred_density(grid, *r, width) for r in trial] for trial in trials]
        )
        densities = densities[0] if len(trials) == 1 else densities.mean(axis=1)
        stderr = np.array([standard_error(column) for column in densities.T])
        return SpectralDensity(densities.mean(axis=0), stderr, grid, width, self.size)

    def _eigenvalues(self, count, order, tolerance, max_products, floor) -> np.ndarray:
        """Return the eigenvalues of each trial, an array `[T, count]`."""
        validation.positive(tolerance=tolerance)
        validation.integer(minimum=count, max_products=max_products)
        accuracy = tolerance, max_products, floor

        def eigenvalues(hessian):
            return top_eigenvalues(hessian.product, hessian.direction(), count, order, *accuracy)

        trials = self._measured(eigenvalues, max_products)
        worst = max((error for _, error in trials if error > tolerance), default=None)
        if worst:
            warn(
                f"The eigenvalues have not converged: they may be wrong by {worst:.1g} of their "
                f"size. Received: tolerance={tolerance}, max_products={max_products}. Raise one of "
                "them."
            )
        return np.array([values for values, _ in trials])

    def _measured(self, measure: Callable[[HessianProducts], Any], num_products: int) -> list:
        """Return what a measure gives for each trial, or for all of the data, with warnings.

        It takes `num_products` at most, which the progress bar shows.
        """
        loss = self._loss()
        loss.warn_of_misfit(self._trials[0])
        results, largest = self._over_trials(loss, measure, num_products)
        check_size(largest, loss.dtype)
        return results

    def _over_trials(self, loss: LossFunction, measure: Callable, num_products: int) -> tuple:
        """Return the results for the trials, and the least of the trials' largest entries."""
        # Anew for each measure: its result does not depend on those that were called before.
        generator = np.random.default_rng(self._seed)
        with progress_bar(num_products * len(self._trials), self._verbose) as progress:
            hessians = [HessianProducts(loss, t, generator, progress) for t in self._trials]
            results = [measure(hessian) for hessian in hessians]
        return results, min(hessian.largest for hessian in hessians)

    def _loss(self) -> LossFunction:
        # Made for each measure: the model may have been compiled again since the last one.
        return LossFunction(self.model, *self._given)


def _from_both_ends(values: np.ndarray) -> np.ndarray:
    """Return the indices of ascending eigenvalues: the last, the first, the last but one, ..."""
    from_below = np.arange(len(values))
    return np.stack([from_below[::-1], from_below], axis=1).ravel()[: len(values)]


def _by_size(values: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(values))
