"""Relative flatness: the curvature by the weights of one layer, relative to their size."""

from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.layer_loss import LayerLoss
from keras_infomcr.flatness.hessian.operator import Hessian


def relative_flatness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    layer: str | None = None,
    num_products: int = 30,
    num_examples: int | None = None,
    num_trials: int = 10,
    chunk_size: int = 128,
    training: bool = False,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the relative flatness of a layer: its curvature times the size of its weights.

        kappa = sum_{s,s'} <w_s, w_s'> tr H_{s,s'}

    with w_s the weights of the layer into its neuron s, and H_{s,s'} the block of the Hessian of
    the loss by w_s and w_s'. A filter of a convolution is a neuron, its weights the patch that it
    is laid over. Biases have no part. Smaller is flatter. Where a network is rescaled without
    changing what it computes, the weights of a ReLU layer multiplied by a number and the next
    layer's divided by it, kappa stays the same.

    It is the trace of the Hessian by Z, at Z = 0, of the loss with the kernel W + Z W in place of
    the kernel W, `[inputs, neurons]`. That trace is estimated by Hutch++ as in `hessian_trace`, by
    products with vectors of this layer alone, which cost the less the nearer it stands to the
    loss. It is exact for a layer so small that `num_products` is at least three times its inputs
    times the smaller number of inputs and neurons.

    Reference: Petzka, Kamp, Adilova, Sminchisescu and Boley, "Relative Flatness and
    Generalization", NeurIPS 2021 (https://arxiv.org/abs/2001.00939).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        layer: String, the name or path of the layer: a `Dense`, or a convolution without groups,
            with a trainable kernel. Defaults to the layer whose kernel is the last in
            `model.trainable_variables`: as a rule the output layer, whose inputs are the features
            that the reference relates to generalisation.
        num_products: Integer, at least 6. As for `hessian_trace`.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        chunk_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        loss: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

    Returns:
        An `Estimate`.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`, and if no such layer has a kernel that can be measured.

    Example:

    ```python
    result = relative_flatness(model, x_train, y_train, seed=0)
    print(f"{result.value:.3f} +- {result.stderr:.3f}")
    ```
    """
    validation.integer(minimum=6, num_products=num_products)
    hessian = _HessianOfLayer(
        layer,
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
    return hessian.trace(num_products=num_products)


class _HessianOfLayer(Hessian):
    """The Hessian by Z, where the kernel W of a layer is W + Z W."""

    def __init__(self, layer: str | None, *args: Any, **kwargs: Any):
        self._layer = layer
        super().__init__(*args, **kwargs)

    def _loss(self) -> LayerLoss:
        return LayerLoss(super()._loss(), self._layer)
