"""The dominant eigenvalue of a symmetric matrix, in a training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops


class Eigenpair(NamedTuple):
    """An approximation of the eigenvalue of largest size and of its eigenvector.

    Attributes:
        value: Scalar array, with its sign; NaN if a product was not finite.
        vector: Array `[W]` of length 1; the start if a product was not finite.
        converged: Boolean scalar array, whether ||A v - value v|| <= tolerance |value|.
    """

    value: Any
    vector: Any
    converged: Any


def dominant_eigenpair(
    product: Callable, start: Any, tolerance: float, max_products: int, cond: Callable | None
) -> Eigenpair:
    """Find the eigenvalue of largest size by Lanczos iteration.

    It takes the best vector in the span of v, A v, A^2 v and so on (Rayleigh-Ritz). Power
    iteration takes the last one, which is further off after the same products and never converges
    if there are eigenvalues of the same size and opposite signs.

    The iteration is unrolled, so that every framework can compile it: XLA is many times slower at
    convolutions within loops.

    Args:
        product: Function `v -> A v` of arrays `[W]`.
        start: Array `[W]`, not zero; the nearer to the eigenvector, the less products are needed.
        tolerance: Float, greater than 0. See `Eigenpair.converged`, which ends the iteration.
        max_products: Integer n, at least 1. Up to n + 1 vectors are kept.
        cond: `backend.cond`, or `None`: n products are computed always, those after the end of
            the iteration of zeros.
    """
    basis = [_unit(start)]
    zero = ops.zeros((), start.dtype)
    ritz = _Ritz(ops.zeros((max_products,) * 2, start.dtype), zero, zero, zero > 0, start)
    for k in range(max_products):

        def advanced(k=k, ritz=ritz):
            return _advanced(product, ops.stack(basis), ritz.projected, k, tolerance)

        def ended(ritz=ritz):
            return tuple(ritz._replace(following=ops.zeros_like(start)))

        found = advanced() if cond is None or not k else cond(ritz.converged, ended, advanced)
        ritz = _Ritz(*found)
        basis.append(ritz.following)
    finite = ops.isfinite(ritz.value)
    vector = _unit(_combined(ritz.coefficients, ops.stack(basis[:-1])))
    return Eigenpair(ritz.value, ops.where(finite, vector, start), ritz.converged)


class _Ritz(NamedTuple):
    """The state of the iteration.

    Attributes:
        projected: Array `[n, n]`, the matrix in the basis, with zeros where it is not known yet.
        value: Scalar array, the Ritz value.
        coefficients: Array `[n]`, the Ritz vector in the basis.
        converged: Boolean scalar array.
        following: Array `[W]`, the next vector of the basis; zeros if the iteration is to end.
    """

    projected: Any
    value: Any
    coefficients: Any
    converged: Any
    following: Any


def _advanced(product, basis, projected, k, tolerance):
    """Return the next state as a tuple, with a product more."""
    image, size = product(basis[k]), projected.shape[0]
    along = ops.sum(basis * image, axis=1)
    rest = image - _combined(along, basis)
    unit = np.eye(size, dtype=np.float32)[k]
    row = ops.pad(along, (0, size - k - 1))
    edge = ops.outer(row, ops.cast(unit, row.dtype))
    projected = projected + edge + ops.transpose(edge) - ops.diag(row * ops.cast(unit, row.dtype))
    finite = ops.all(ops.isfinite(projected))
    # Decompositions of what is not finite raise errors.
    values, vectors = ops.eigh(ops.where(finite, projected, 0.0))
    # Not by an index, which XLA on TensorFlow wants to be a constant.
    largest = ops.one_hot(ops.argmax(ops.abs(values)), size, dtype=values.dtype)
    value, coefficients = ops.sum(values * largest), ops.sum(vectors * largest, axis=1)
    # At no obtuse angle to the start, so that equal computations have equal signs.
    coefficients = ops.where(coefficients[0] < 0, -coefficients, coefficients)
    residual = _length(rest) * ops.abs(coefficients[k])
    converged = ops.logical_and(finite, residual <= tolerance * ops.abs(value))
    rest = _unit(rest)
    rest = _unit(rest - _combined(ops.sum(basis * rest, axis=1), basis))  # twice is enough
    value = ops.where(finite, value, float("nan"))
    return projected, value, coefficients, converged, ops.where(converged, 0.0, rest)


def _combined(coefficients, vectors):
    # Not as a matrix product, which a GPU may round like half precision.
    return ops.sum(coefficients[:, None] * vectors, axis=0)


def _unit(vector):
    return ops.divide_no_nan(vector, _length(vector))


def _length(vector):
    return ops.sqrt(ops.sum(ops.square(vector)))
