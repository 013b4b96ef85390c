"""Eigenvalues of a symmetric matrix known by its products with vectors."""

import numpy as np

from keras_infomcr.core.euclidean_norm import unit_of


def top_eigenvalues(product, start, count, order, tolerance, max_products, floor):
    """Find eigenvalues at one end or both ends of a spectrum, by thick-restart Lanczos.

    It may find only one copy of a repeated eigenvalue.

    Reference: Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems", SIAM Journal on Matrix Analysis and Applications, 2000.

    Args:
        product: Function `v -> A v` of arrays `[W]`.
        start: Array `[W]`, not zero. Vectors are kept in its dtype, at most 2 count + 20 of them.
        count: Integer, at least 1, the number of eigenvalues that are wanted.
        order: Function of an ascending array of eigenvalues that returns their indices, those
            that are wanted most first.
        tolerance: Float, greater than 0. Each eigenvalue is as near to an exact one as this
            fraction of its size, sizes below `floor` times the largest counting as that.
        max_products: Integer, at least 1.
        floor: Float in (0, 1].

    Returns:
        Tuple of the eigenvalues, an array of `count` numbers at most in the order wanted;
        the largest of their error bounds, relative likewise, `max_products` having been too small
        if it exceeds the tolerance; and their vectors, orthonormal rows of an array. NaN if a
        product is not finite.
    """
    size = min(2 * count + 20, len(start))
    basis = np.zeros((size + 1, len(start)), start.dtype)
    projected = np.zeros((size, size))
    basis[0] = start / np.linalg.norm(start)
    filled, generator, unit = 0, np.random.default_rng(0), None
    for used in range(1, max_products + 1):
        vector, unit = _in_units(product(basis[filled]), start.dtype, unit)
        if vector is None:
            return np.full(count, np.nan), np.nan, np.full((count, len(start)), np.nan)
        known = basis[: filled + 1]
        vector, along = _orthogonalized(vector, known)
        projected[filled, : filled + 1] = projected[: filled + 1, filled] = along
        length = float(np.linalg.norm(vector))
        filled += 1
        values, vectors = np.linalg.eigh(projected[:filled, :filled])
        wanted = order(values)
        first = wanted[:count]
        scale = np.abs(values).max() or 1.0
        residuals = length * np.abs(vectors[-1, first])
        errors = residuals / np.maximum(np.abs(values[first]), floor * scale)
        exhausted = length <= np.finfo(start.dtype).eps * scale or filled == len(start)
        error = 0.0 if exhausted else float(errors.max())
        enough = filled >= count and error <= tolerance
        if enough or filled == len(start) or used == max_products:
            break
        if exhausted:  # an invariant subspace, too small: go on outside of it
            outside = generator.standard_normal(len(start)).astype(start.dtype)
            vector, _ = _orthogonalized(outside, known)
            length = float(np.linalg.norm(vector))
        if filled == size:
            kept = wanted[: count + 10]
            basis[: len(kept)] = vectors[:, kept].T.astype(start.dtype) @ basis[:size]
            projected[:] = 0
            np.fill_diagonal(projected[: len(kept), : len(kept)], values[kept])
            filled = len(kept)
        basis[filled] = vector / length
    return (unit or 1.0) * values[first], error, vectors[:, first].T.astype(start.dtype) @ known


def _in_units(vector, dtype, unit):
    """Return a product in units of the first that is not zero, and the unit; or `None` for NaN.

    Squares of numbers as small as 1e-22, or as large as 1e22, are not to be had in float32.
    """
    vector = np.asarray(vector, dtype)
    if not np.isfinite(vector).all():
        return None, unit
    if unit is None and vector.any():
        unit = unit_of(vector)
    return vector / (unit or 1.0), unit


def _orthogonalized(vector, known):
    """Return a vector without its part in the span of orthonormal rows, and that in their basis."""
    along = known @ vector
    vector = vector - along @ known
    correction = known @ vector  # twice is enough
    return vector - correction @ known, along + correction


def tridiagonal(product, start, num_steps):
    """Reduce a symmetric matrix to tridiagonal form by the Lanczos recurrence.

    Only two vectors are kept. They lose their orthogonality, so that eigenvalues already found
    appear again and share their weight with the copies.

    Args:
        product: Function `v -> A v` of arrays `[W]`.
        start: Array `[W]`, not zero.
        num_steps: Integer, at least 1, the number of products.

    Returns:
        Array `[m, m]`, m being `num_steps`, or less if the recurrence ends. NaN if a product is
        not finite.
    """
    before, vector, off = np.zeros_like(start), start / np.linalg.norm(start), 0.0
    diagonal, off_diagonal, unit = [], [], None
    for _ in range(min(num_steps, len(start))):
        new, unit = _in_units(product(vector), start.dtype, unit)
        if new is None:
            return np.full((1, 1), np.nan)
        new = new - off * before
        diagonal.append(float(vector @ new))
        new -= diagonal[-1] * vector
        off = float(np.linalg.norm(new))
        off_diagonal.append(off)
        if off <= np.finfo(start.dtype).eps * max(map(abs, diagonal)):
            break
        before, vector = vector, new / off
    sides = np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
    return (unit or 1.0) * (np.diag(diagonal) + sides)
