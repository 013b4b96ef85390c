"""The trace of a symmetric matrix known by its products with vectors."""

import numpy as np


def hutchinson(product, probes):
    """Estimate the trace: the mean of z^T A z over random z with E[z z^T] = I.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", Communications in Statistics, 1990.

    Args:
        product: Function `v -> A v` of arrays `[W]`.
        probes: Iterable of arrays `[W]`, the z.

    Returns:
        Array of estimates, one a probe, each unbiased.
    """
    return np.array([float(probe @ product(probe)) for probe in probes])


def hutch_plus_plus(product, sketches, probes):
    """Estimate the trace: exactly where the matrix is largest, by `hutchinson` elsewhere.

        tr A = tr(Q^T A Q) + tr((I - Q Q^T) A (I - Q Q^T)),    Q a basis of A S

    Reference: Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal Stochastic Trace Estimation",
    SOSA 2021, Algorithm 1 (https://arxiv.org/abs/2010.09649).

    Args:
        product: Function `v -> A v` of arrays `[W]`.
        sketches: Iterable of arrays `[W]`, the columns of S. Each costs two products.
        probes: Iterable of arrays `[W]`, the z. Each costs one product.

    Returns:
        Array of estimates, one a probe, each unbiased.
    """
    basis, _ = np.linalg.qr(np.stack([product(sketch) for sketch in sketches], axis=1))
    exact = sum(float(column @ product(column)) for column in basis.T)
    rest = (probe - basis @ (basis.T @ probe) for probe in probes)
    return exact + hutchinson(product, rest)
