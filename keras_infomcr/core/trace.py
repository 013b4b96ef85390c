"""The trace of a symmetric matrix known by its products with vectors, its shares, and its norm."""

import numpy as np


def inner_products(vectors, others):
    """Return the inner product of each row of an array `[k, W]` with that of another, `[k]`."""
    return np.einsum("kw,kw->k", vectors, others, dtype="float64")


def squared_norms(vectors, images):
    """Return the squared norm of each row of the second array `[k, W]`, an array `[k]`.

    In place of inner products z^T A z it gives ||A z||^2 = z^T A^2 z, so that the estimators of the
    trace estimate tr A^2 = ||A||_F^2 from the products with A alone. For `hutch_plus_plus`, because
    Q^T Q = I and A = A^T,

        ||A||_F^2 = 2 ||A Q||_F^2 - ||Q^T A Q||_F^2 + ||R A R||_F^2
    """
    return np.einsum("kw,kw->k", images, images, dtype="float64")


def hutchinson(products, probes, dots=inner_products):
    """Estimate the trace: the mean of z^T A z over random z with E[z z^T] = I.

    The share of a block b of the coordinates, the trace of the block, is the mean of z_b^T (A z)_b.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", Communications in Statistics, 1990.

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        probes: Iterable of arrays `[k, W]`, the z, of which one is kept at a time.
        dots: Function of two arrays `[k, W]` that returns the inner products of their rows, `[k]`,
            or of their blocks, `[k, L]`; or `squared_norms`. Defaults to the first.

    Returns:
        Array of as many estimates as there are z, each unbiased: `[n]`, or `[n, L]` by blocks.
    """
    return np.concatenate([dots(z, products(z)) for z in probes])


def hutch_plus_plus(products, sketches, probes, dots=inner_products):
    """Estimate the trace: exactly where the matrix is largest, by `hutchinson` elsewhere.

        tr A = tr(Q^T A Q) + tr(R A R),    Q a basis of A S,    R = I - Q Q^T

    By blocks: A = (A Q Q^T + Q Q^T A - Q Q^T A Q Q^T) + R A R, of which each block has a trace.
    The first is exact, and the shares of each estimate sum to the estimate.

    Reference: Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal Stochastic Trace Estimation",
    SOSA 2021, Algorithm 1 (https://arxiv.org/abs/2010.09649).

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        sketches: Iterable of arrays `[r, W]`, the columns of S. Each costs two products.
        probes: Iterable of arrays `[k, W]`, the z. Each costs one product.
        dots: As for `hutchinson`.

    Returns:
        Array of as many estimates as there are z, each unbiased: `[n]`, or `[n, L]` by blocks.
    """
    images = np.concatenate([products(s) for s in sketches])
    basis = np.linalg.qr(images.T)[0].T
    images = products(basis)
    within = (images @ basis.T) @ basis
    exact = np.sum(2 * dots(basis, images) - dots(basis, within), axis=0)

    def outside(vectors):
        return vectors - (vectors @ basis.T) @ basis

    return exact + hutchinson(lambda z: outside(products(outside(z))), probes, dots)
