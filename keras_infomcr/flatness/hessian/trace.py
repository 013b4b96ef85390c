"""The trace of the Hessian: the sum of all curvatures."""

from typing import Any

import keras

from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import Hessian


def hessian_trace(
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
    """Estimate the trace of the Hessian of the loss by the weights.

    The loss is the compiled one, or `loss`, and its mean over the examples. Weight penalties are
    left out; label smoothing, `loss_weights`, `add_loss` and activity penalties are part of it.
    Cross-entropies are computed from the logits, also where a model ends in a softmax or sigmoid,
    so that their curvature is right where probabilities are rounded to 0 and 1. The model, its
    state, its optimizer and all seeds are left as they are. What is compiled is kept as long as
    the model lives: a second measure of the same loss begins at once.

    A warning says so if the model does not fit its data (a mean cross-entropy above twice the
    cross-entropy of a uniform guess): where training has diverged the curvatures may vanish, but
    not at a flat minimum.

    Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", 1990; Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal
    Stochastic Trace Estimation", 2021 (https://arxiv.org/abs/2010.09649).

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`
            that can be read again and again and give the same examples each time. Sample weights
            are not used.
        y: Array or structure of arrays `[N, ...]`, the labels; `None` if `x` gives batches.
        num_products: Integer, at least 2, at least 6 for `"hutch++"`. Hessian-vector products,
            of all the data or for each trial; each costs as much as some 2 to 4 epochs of
            training. The standard error falls as the square root of their number, or faster. From
            fewer than 15 products the standard error is itself a rough estimate, and too small
            more often than not. Defaults to 30.
        method: `"hutchinson"` or `"hutch++"`, which spends two thirds of the products on the
            largest eigenvalues, exactly, and estimates the rest. Its standard error is the
            smaller one where a few eigenvalues are far larger than the others, as for most
            networks. It keeps `num_products / 3` vectors like the weights, and for a moment some
            six times as many; `"hutchinson"` works with ten vectors at a time. Defaults to
            `"hutch++"`.
        num_examples: Integer, at least 1, N', the examples of a trial; or `None`: all of the
            data is measured, in batches. Defaults to `None`.
        num_trials: Integer, at least 1. T, the trials averaged, if `num_examples` is given.
            Trials share no example until all have been used; of data in batches the first
            `num_examples * num_trials` are read. Defaults to 10.
        chunk_size: Integer, at least 1: examples that go through the model together, unless the
            data come in batches. With `training=False` it does not change the result, unless
            masks or an `ignore_class` weight the examples. Defaults to 128.
        training: Boolean, whether batch normalisation uses the statistics of the batch, and
            random layers act, with the masks that the model's own seeds give. Defaults to
            `False`.
        loss: What to measure in place of the compiled loss: a loss of Keras, its name, a function
            of `(y_true, y_pred)` that returns the loss of each example or their mean, or a
            structure of these like the outputs. With it a model can be measured that is not
            compiled, or whose `train_step` or `compute_loss` is its own: the loss is what
            `keras.Model` makes of `model.compile(loss=loss)`. Pass the same function again rather
            than a new `lambda`, for which all is compiled anew. Let it depend on its arguments
            alone: another value that it reads is kept, on JAX, from the first measurement.
            Defaults to `None`: the compiled loss, by the model's `compute_loss`.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the passes over the data. Defaults to 0.

    Returns:
        An `Estimate`.

    Raises:
        TypeError: If `model` or `x` is of a wrong type.
        ValueError: If an argument is out of its range, the model has no loss or is not built,
            its loss is no mean over the examples, or the data are empty, hold NaN or infinity,
            too few examples, or a label of a sparse cross-entropy that stands for no class.

    Example:

    ```python
    result = hessian_trace(model, x_train, y_train, num_examples=100, seed=0)
    print(f"{result.value:.1f} +- {result.stderr:.1f}")
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
    return hessian.trace(num_products=num_products, method=method)
