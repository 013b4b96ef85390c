"""The Frobenius norm of the Hessian: the root of the sum of all squared curvatures."""

from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.core.euclidean_norm import euclidean_norm, unit_of
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import mean_estimate, measure_hessian


def hessian_frobenius_norm(
    model: keras.Model, x: Any, y: Any = None, *, num_products: int = 30, **settings: Any
) -> Estimate:
    """Estimate the Frobenius norm of the Hessian H of the loss by the weights.

        ||H||_F^2 = E ||H z||^2,    z random vectors of entries -1 and 1

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1 (https://arxiv.org/abs/1911.08192), which takes the
    square of this. With trials, their squares are averaged.

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_products: Integer, at least 2. Hessian-vector products, of all the data or a trial.
            The standard error falls as its square root. Defaults to 30.
        **settings: `num_examples`, `num_trials`, `batch_size`, `training`, `seed` and `verbose`,
            as for `hessian_trace`.

    Returns:
        An `Estimate`, its samples the ||H z||, with the standard error of a root.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_frobenius_norm(model, x_train, y_train, num_examples=100, seed=0)
    ```
    """
    validation.integer(minimum=2, num_products=num_products)

    def norms(hessian):
        products = map(hessian.products, hessian.probes(num_products))
        return np.array([euclidean_norm(p) for some in products for p in some])

    trials = measure_hessian(norms, model, x, y, num_products, **settings)
    unit = unit_of(trials)
    square = mean_estimate([(trial / unit) ** 2 for trial in trials])
    norm = np.sqrt(square.value)
    stderr = square.stderr / (2 * norm) if norm else square.stderr
    return Estimate(float(unit * norm), float(unit * stderr), unit * np.sqrt(square.samples))
