"""The Frobenius norm of the Hessian: the root of the sum of all squared curvatures."""

from typing import Any

import keras

from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import Hessian


def hessian_frobenius_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_products: int = 30,
    method: str = "hutch++",
    num_examples: int | None = None,
    num_trials: int = 10,
    chunk_size: int = 128,
    training: bool = False,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the Frobenius norm of the Hessian H of the loss by the weights.

        ||H||_F^2 = E ||H z||^2,    z random vectors of entries -1 and 1

    of which Hutch++ computes the share of a basis Q of the range of the largest eigenvalues
    exactly, and estimates only the rest:

        ||H||_F^2 = 2 ||H Q||_F^2 - ||Q^T H Q||_F^2 + E ||R H R z||^2,    R = I - Q Q^T

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192), which takes the
    square of this. Over trials the squares are averaged. Meyer, Musco, Musco and Woodruff,
    "Hutch++: Optimal Stochastic Trace Estimation", SOSA 2021 (https://arxiv.org/abs/2010.09649),
    for the idea, here applied to the trace of H^2 with the products of H alone.

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_products: As for `hessian_trace`. Defaults to 30.
        method: As for `hessian_trace`. Defaults to `"hutch++"`.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

    Returns:
        An `Estimate`, with the standard error of a root; its samples are the roots of unbiased
        estimates of ||H||_F^2.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_frobenius_norm(model, x_train, y_train, num_examples=100, seed=0)
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
    return hessian.frobenius_norm(num_products=num_products, method=method)
