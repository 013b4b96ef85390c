"""The trace of a symmetric matrix known by its products with vectors."""

import numpy as np


def hutchinson(products, probes):
    """Estimate the trace: the mean of z^T A z over random z with E[z z^T] = I.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", Communications in Statistics, 1990.

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        probes: Iterable of arrays `[k, W]`, the z, of which one is kept at a time.

    Returns:
        Array of as many estimates as there are z, each unbiased.
    """
    dots = [np.einsum("kw,kw->k", z, products(z), dtype="float64") for z in probes]
    return np.concatenate(dots)


def hutch_plus_plus(products, sketches, probes):
    """Estimate the trace: exactly where the matrix is largest, by `hutchinson` elsewhere.

        tr A = tr(Q^T A Q) + tr((I - Q Q^T) A (I - Q Q^T)),    Q a basis of A S

    Reference: Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal Stochastic Trace Estimation",
    SOSA 2021, Algorithm 1 (https://arxiv.org/abs/2010.09649).

    Args:
        products: Function of an array `[k, W]` of vectors that returns A times each.
        sketches: Iterable of arrays `[r, W]`, the columns of S. Each costs two products.
        probes: Iterable of arrays `[k, W]`, the z. Each costs one product.

    Returns:
        Array of as many estimates as there are z, each unbiased.
    """
    images = np.concatenate([products(s) for s in sketches])
    basis = np.linalg.qr(images.T)[0].T
    exact = hutchinson(products, [basis]).sum()
    return exact + hutchinson(products, (z - (z @ basis.T) @ basis for z in probes))
