"""The spectral radius of the Hessian: the largest curvature, by its size."""

from typing import Any

import keras

from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.results import SpectralRadius


def hessian_spectral_radius(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    tolerance: float = 0.01,
    max_products: int = 100,
    num_examples: int | None = None,
    num_trials: int = 10,
    chunk_size: int = 128,
    training: bool = False,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> SpectralRadius:
    """Compute the spectral radius of the Hessian of the loss by the weights, and both extremes.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192). It is computed by
    Lanczos iterations (Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems", 2000).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        tolerance: Float, greater than 0. Each returned extreme has an exact eigenvalue within
            `tolerance` times its size, or times a tenth of the spectral radius if that is larger.
            The error of an extreme that is well apart from other eigenvalues is, as a rule, of
            the order of the square of that fraction. Defaults to 0.01.
        max_products: Integer, at least 2. Hessian-vector products at most, of all the data or for
            each trial. Some 10 to 30 are usual; `hessian_top_eigenvalues(num_eigenvalues=1)`,
            which leaves the other extreme out, takes 5 to 10. If they do not suffice, a warning
            says so. Defaults to 100.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

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
    hessian = Hessian(
        model,
        x,
        y,
        num_examples=num_examples,
        num_trials=num_trials,
        chunk_size=chunk_size,
        training=training,
        loss=loss,
        seed=seed,
        verbose=verbose,
    )
    return hessian.spectral_radius(tolerance=tolerance, max_products=max_products)
