"""How the trace of a Hessian is estimated, as a whole or by layer, and its Frobenius norm."""

import dataclasses
from collections.abc import Callable

import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import unit_of
from keras_infomcr.core.trace import hutch_plus_plus, hutchinson, inner_products, squared_norms
from keras_infomcr.flatness.hessian.products import HessianProducts
from keras_infomcr.flatness.hessian.results import TopEigenvalues


@dataclasses.dataclass(frozen=True)
class TraceEstimates:
    """An estimator of the traces of Hessians, or of their blocks.

    Args:
        num_products: Integer, at least 2, at least 6 for `"hutch++"`.
        method: `"hutchinson"` or `"hutch++"`.
        dots: Function of two arrays `[k, W]` that returns the inner products of their rows, or
            those of their blocks, as for `core.trace.hutchinson`.
        known: A `TopEigenvalues` with vectors, or `None`. H is the sum of the matrix that has
            these alone, whose traces are computed, and a rest, whose traces are estimated.
    """

    num_products: int
    method: str
    dots: Callable[[np.ndarray, np.ndarray], np.ndarray] = inner_products
    known: TopEigenvalues | None = None

    def __post_init__(self):
        validation.one_of("hutchinson", "hutch++", method=self.method)
        fewest = 2 if self.method == "hutchinson" else 6
        validation.integer(minimum=fewest, num_products=self.num_products)
        if getattr(self.known, "vectors", self) is None:
            raise ValueError(
                "`known` must be the result of `top_eigenvalues(vectors=True)`. "
                f"Received: known={self.known!r}"
            )

    def __call__(self, hessian: HessianProducts) -> np.ndarray:
        """Return the estimates, an array `[n]`, or `[n, L]` by blocks."""
        exact, products = self._without_known(hessian.products)
        if self.method == "hutchinson":
            return exact + hutchinson(products, hessian.probes(self.num_products), self.dots)
        # A sketch takes two products: one for the range, one for the trace within it.
        sketches = hessian.probes(self.num_products // 3)
        probes = hessian.probes(self.num_products - 2 * (self.num_products // 3))
        return exact + hutch_plus_plus(products, sketches, probes, self.dots)

    def norms(self, hessian: HessianProducts) -> np.ndarray:
        """Return estimates of the Frobenius norm, `[n]`, whose squares are unbiased."""
        unit = None

        def squares(vectors, images):
            # The squares of very small or very large numbers would vanish or overflow. One unit
            # serves all, which is known after the first products.
            nonlocal unit
            unit = unit or unit_of(hessian.largest)
            return squared_norms(vectors, images / unit)

        estimates = dataclasses.replace(self, dots=squares)(hessian)
        return unit * np.sqrt(estimates)

    def _without_known(self, products: Callable) -> tuple:
        """Return the traces of the part of H that is known, and the products with the rest."""
        if self.known is None:
            return 0.0, products
        basis, values = self.known.vectors, self.known.eigenvalues
        exact = np.sum(self.dots(basis, values[:, None] * basis), axis=0)

        def of_rest(vectors):
            return products(vectors) - ((vectors @ basis.T) * values) @ basis

        return exact, of_rest
