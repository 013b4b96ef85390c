"""The trace of a symmetric matrix known by its products with vectors."""

import numpy as np


def hutchinson(products, probes):
    """Estimate the trace: the mean of z^T A z over random z with E[z z^T] = I.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", Communications in Statistics, 1990.

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        probes: Array `[k, W]`, the z.

    Returns:
        Array `[k]` of estimates, each unbiased.
    """
    return np.einsum("kw,kw->k", probes, products(probes), dtype="float64")


def hutch_plus_plus(products, sketches, probes):
    """Estimate the trace: exactly where the matrix is largest, by `hutchinson` elsewhere.

        tr A = tr(Q^T A Q) + tr((I - Q Q^T) A (I - Q Q^T)),    Q a basis of A S

    Reference: Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal Stochastic Trace Estimation",
    SOSA 2021, Algorithm 1 (https://arxiv.org/abs/2010.09649).

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        sketches: Array `[r, W]`, the columns of S. Each costs two products.
        probes: Array `[k, W]`, the z. Each costs one product.

    Returns:
        Array `[k]` of estimates, each unbiased.
    """
    basis = np.linalg.qr(products(sketches).T)[0].T
    exact = hutchinson(products, basis).sum()
    return exact + hutchinson(products, probes - (probes @ basis.T) @ basis)
