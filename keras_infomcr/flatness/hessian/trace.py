"""The trace of the Hessian: the sum of all curvatures."""

from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.core.trace import hutch_plus_plus, hutchinson
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import mean_estimate, measure_hessian


def hessian_trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_products: int = 30,
    method: str = "hutch++",
    num_examples: int | None = None,
    num_trials: int = 10,
    batch_size: int = 128,
    training: bool = False,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Estimate the trace of the Hessian of the loss by the weights.

    The loss is the compiled one, its mean over the examples, without weight penalties: label
    smoothing, `loss_weights`, `add_loss` and activity penalties are part of it. Cross-entropies are
    computed from the logits, of a model that ends in a softmax or sigmoid too, so that their
    curvature is right where probabilities are rounded to 0 and 1. The model, its state, its
    optimizer and all seeds are left as they are. A warning says so if the model does not fit
    its data (a mean cross-entropy above twice that of a uniform guess): where training has diverged
    the curvatures may vanish, but not at a flat minimum.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", 1990; Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal
    Stochastic Trace Estimation", 2021 (https://arxiv.org/abs/2010.09649).

    Args:
        model: A compiled and built `keras.Model`.
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`
            that can be read again and again and give the same examples each time. Sample weights
            are not used.
        y: Array or structure of arrays `[N, ...]`, the labels; `None` if `x` gives batches.
        num_products: Integer, at least 2, at least 6 for `"hutch++"`. Hessian-vector products,
            of all the data or a trial, each of the cost of some 2 to 4 epochs of training. The
            standard error falls as its square root or faster; from fewer than 15 it is itself
            a rough estimate, and too small more often than not. Defaults to 30.
        method: `"hutchinson"` or `"hutch++"`, which spends two thirds of the products on the
            largest eigenvalues, exactly, and estimates the rest. Its standard error is the
            smaller one where a few eigenvalues are far larger than the others, as for most
            networks. It keeps `num_products / 3` vectors like the weights, and for a moment
            some six times as many, where the other one works with ten at a time, as
            `hessian_frobenius_norm` does. Defaults to `"hutch++"`.
        num_examples: Integer, at least 1, N', the examples of a trial; or `None`: all of the
            data is measured, in batches. Defaults to `None`.
        num_trials: Integer, at least 1. T, the trials averaged, if `num_examples` is given.
            Trials share no example until all have been used; of data in batches the first
            `num_examples * num_trials` are read. Defaults to 10.
        batch_size: Integer, at least 1: examples that go through the model together, unless the
            data come in batches. With `training=False` it does not change the result, unless
            masks or an `ignore_class` weight the examples. Defaults to 128.
        training: Boolean, whether batch normalisation uses the statistics of the batch, and
            random layers act, with the masks that the model's own seeds give. Defaults to
            `False`.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the passes over the data. Defaults to 0.

    Returns:
        An `Estimate`.

    Raises:
        TypeError: If `model` or `x` is of a wrong type.
        ValueError: If an argument is out of its range, the model is not compiled or not built,
            its loss is no mean over the examples, or the data are empty, hold NaN or infinity,
            too few examples, or a label of a sparse cross-entropy that stands for no class.

    Example:

    ```python
    result = hessian_trace(model, x_train, y_train, num_examples=100, seed=0)
    print(f"{result.value:.1f} +- {result.stderr:.1f}")
    ```
    """
    validation.one_of("hutchinson", "hutch++", method=method)
    validation.integer(minimum=2 if method == "hutchinson" else 6, num_products=num_products)

    def trace(hessian):
        if method == "hutchinson":
            return hutchinson(hessian.products, hessian.probes(num_products))
        sketches = hessian.probes(num_products // 3)
        probes = hessian.probes(num_products - 2 * (num_products // 3))
        return hutch_plus_plus(hessian.products, sketches, probes)

    trials = measure_hessian(
        trace,
        model,
        x,
        y,
        num_products,
        num_examples=num_examples,
        num_trials=num_trials,
        batch_size=batch_size,
        training=training,
        seed=seed,
        verbose=verbose,
    )
    return mean_estimate(trials)
