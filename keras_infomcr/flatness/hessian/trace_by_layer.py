"""The trace of the Hessian of each layer: which of them make a minimum sharp."""

from typing import Any

import keras

from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.results import HessianTraceByLayer


def hessian_trace_by_layer(
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
) -> HessianTraceByLayer:
    """Estimate the trace of the Hessian by the weights of each layer, the others held fixed.

        tr H_ll = E z_l^T (H z)_l,    z random vectors of entries -1 and 1, z_l a layer's entries

    All layers are estimated from the same products, so that it costs what `hessian_trace` does.
    The traces sum to the trace of the Hessian, and with the same seed they sum to the very
    estimate of `hessian_trace`. The error of a layer is somewhat larger than by products of its
    own, because the products hold the curvature between layers, which averages out.

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
        A `HessianTraceByLayer`, which `keras_infomcr.flatness.plot.by_layer` draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = hessian_trace_by_layer(model, x_train, y_train, num_examples=100, seed=0)
    plot.by_layer(result).figure.savefig("layers.png")
    ```

    Reference: as for `hessian_trace`.
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
    return hessian.trace_by_layer(num_products=num_products, method=method)
