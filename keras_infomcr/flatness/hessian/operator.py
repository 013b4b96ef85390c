"""The Hessian of a model's loss, an object that a user can keep."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.lanczos import tridiagonal
from keras_infomcr.core.quadrature import quadrature
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.eigenvalues import (
    EigenvalueSearch,
    by_size,
    check_arguments,
    from_both_ends,
)
from keras_infomcr.flatness.hessian.products import HessianProducts, check_size
from keras_infomcr.flatness.hessian.results import (
    HessianTraceByLayer,
    SpectralDensity,
    SpectralRadius,
    TopEigenvalues,
    of_draws_or_trials,
    root_of_mean,
)
from keras_infomcr.flatness.hessian.trace_estimates import TraceEstimates
from keras_infomcr.flatness.layers_of_weights import LayersOfWeights
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
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
    gradient = hessian.gradient()
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

    def gradient(self) -> np.ndarray:
        """Return the gradient of the loss; over trials, the mean of their gradients.

        Returns:
            Array `[W]`, in the order and the dtype of `product`.
        """
        gradients, _ = self._over_trials(self._loss(), HessianProducts.gradient, 1)
        return np.mean(gradients, axis=0)

    def trace(self, *, num_products: int = 30, method: str = "hutch++") -> Estimate:
        """Estimate the trace, as `hessian_trace` does; its arguments are explained there."""
        estimates = TraceEstimates(num_products, method)
        return Estimate.of(of_draws_or_trials(self._measured(estimates, num_products)))

    def trace_by_layer(
        self,
        *,
        num_products: int = 30,
        method: str = "hutch++",
        known: TopEigenvalues | None = None,
    ) -> HessianTraceByLayer:
        """Estimate the traces of layers, as `hessian_trace_by_layer` does, which explains it.

        The eigenvalues `known`, with vectors, of this Hessian or one like it have their share
        computed, which lowers the standard errors at no further product. The estimates are
        unbiased whatever the vectors are.
        """
        weights = LayersOfWeights(self.model.trainable_variables)
        estimates = TraceEstimates(num_products, method, weights.dots, known)
        samples = of_draws_or_trials(self._measured(estimates, num_products))
        return HessianTraceByLayer.of(weights, samples)

    def frobenius_norm(self, *, num_products: int = 30, method: str = "hutch++") -> Estimate:
        """Estimate the Frobenius norm, as `hessian_frobenius_norm` does, which explains it."""
        estimates = TraceEstimates(num_products, method)
        return root_of_mean(self._measured(estimates.norms, num_products))

    def spectral_radius(
        self, *, tolerance: float = 0.01, max_products: int = 100
    ) -> SpectralRadius:
        """Compute the spectral radius, as `hessian_spectral_radius` does, which explains it."""
        # An edge near zero, which nothing but many products tells from zero, is not worth them.
        search = EigenvalueSearch(2, from_both_ends, tolerance, max_products, floor=0.1)
        extremes, _ = self._eigenvalues(search)
        largest, smallest = (float(extremes[:, k].mean()) for k in (0, -1))
        radii = np.abs(extremes).max(axis=1)
        return SpectralRadius.of(radii, largest=largest, smallest=smallest)

    def top_eigenvalues(
        self,
        *,
        num_eigenvalues: int = 10,
        tolerance: float = 0.01,
        max_products: int = 200,
        vectors: bool = False,
        starts: np.ndarray | None = None,
    ) -> TopEigenvalues:
        """Compute the largest eigenvalues, as `hessian_top_eigenvalues` does, which explains it.

        `starts` is an array `[n, W]` of vectors near the eigenvectors, such as those found some
        steps of training ago: about half as many products are then needed. An eigenvalue that has
        overtaken theirs since may be missed, the more so the fewer are sought.
        """
        check_arguments(num_eigenvalues, vectors, starts, self.size, len(self._trials))
        search = EigenvalueSearch(
            num_eigenvalues, by_size, tolerance, max_products, 0.01, starts, vectors
        )
        samples, (found, *_) = self._eigenvalues(search)
        first, means = Estimate.of(samples[:, 0]), samples.mean(axis=0)
        return TopEigenvalues(first.value, first.stderr, samples, means, found)

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
        return SpectralDensity.of_quadratures(trials, width, self.size)

    def _eigenvalues(self, search: EigenvalueSearch) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the eigenvalues of each trial, `[T, count]`, and a list of their vectors."""
        values, errors, vectors = zip(*self._measured(search, search.max_products))
        search.warn_of_errors(errors)
        return np.array(values), list(vectors)

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
