"""The eigenvalues of largest size of the Hessian."""

from typing import Any

import keras

from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.results import TopEigenvalues


def hessian_top_eigenvalues(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_eigenvalues: int = 10,
    tolerance: float = 0.01,
    max_products: int = 200,
    vectors: bool = False,
    num_examples: int | None = None,
    num_trials: int = 10,
    chunk_size: int = 128,
    training: bool = False,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> TopEigenvalues:
    """Compute the eigenvalues of largest size of the Hessian of the loss by the weights.

    It may find only one copy of a repeated eigenvalue.

    Reference: Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems", SIAM Journal on Matrix Analysis and Applications, 2000.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_eigenvalues: Integer, k, from 1 to the number of weights. 2 k + 20 vectors like the
            weights are kept, and 4 k + 40 for a moment. Defaults to 10.
        tolerance: Float, greater than 0. Each returned eigenvalue has an exact one within
            `tolerance` times its size, or times a hundredth of the largest if that is larger.
            (Lanczos iterations may, rarely, miss one between them.) Defaults to 0.01.
        max_products: Integer, at least `num_eigenvalues`; as for
            `hessian_spectral_radius`. Defaults to 200.
        vectors: Boolean, whether to return the eigenvectors too, which needs `num_examples=None` or
            `num_trials=1`. They are less exact than the eigenvalues: where two eigenvalues differ
            by less than the tolerance, their eigenvectors may be mixed. Defaults to `False`.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

    Returns:
        A `TopEigenvalues`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_top_eigenvalues(model, x_train, y_train, num_eigenvalues=5, num_examples=100)
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
    return hessian.top_eigenvalues(
        num_eigenvalues=num_eigenvalues,
        tolerance=tolerance,
        max_products=max_products,
        vectors=vectors,
    )
