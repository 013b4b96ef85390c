"""The Fisher-Rao norm: the length of the weights, measured by the Fisher information."""

from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.fisher.logit_slopes import logit_slopes
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


def fisher_rao_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    labels: str = "model",
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> Estimate:
    """Compute the Fisher-Rao norm of the weights w.

        ||w||^2 = <w, F w> = E[<w, grad_w ln p(y|x)>^2]

    with F the Fisher information: x are the examples, y labels as the model draws them. It does
    not change with the weights as long as the network computes the same, where layers of a ReLU
    network are rescaled or weights before batch normalisation. It grows with the logits, whose
    variance it is, (L + 1)^2 E[Var z], for a ReLU network of L hidden layers without biases.

    Each example's <w, grad ln p> is one derivative of its logits, by t where the weights are
    (1 + t) w: no gradient of a single example is formed, and the result is exact for the
    examples. Weights are the trainable ones. Batch normalisation is in inference mode.

    Reference: Liang, Poggio, Rakhlin and Stokes, "Fisher-Rao Metric, Geometry, and Complexity of
    Neural Networks", AISTATS 2019 (https://arxiv.org/abs/1711.01530), which leaves open which
    labels are meant.

    Args:
        model: As for `hessian_trace`, with one softmax cross-entropy of classes, or one sigmoid
            cross-entropy of one output.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        labels: `"model"`, the expectation over the labels that the model gives each example with
            its own probabilities, as Fisher information is defined; or `"data"`, the labels `y`,
            as for `fisher_trace`, with which it vanishes as the loss does. Defaults to `"model"`.
        num_examples: As for `local_energy`.
        chunk_size: As for `local_energy`.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.
        verbose: 0 or 1. With 1, a progress bar counts the batches. Defaults to 0.

    Returns:
        An `Estimate` of ||w||, its samples the norms of the examples by themselves: `value` is
        the root of the mean of their squares, and `stderr` takes them for a sample of more.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`, and for other losses.

    Example:

    ```python
    result = fisher_rao_norm(model, x_train, y_train, num_examples=1000, seed=0)
    ```
    """
    validation.one_of("model", "data", labels=labels)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossFunction(model, loss=loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    slopes = logit_slopes(function, next(iter(data))[0])
    function.warn_of_misfit(data)
    at, squares = function.point(), []
    with progress_bar(None, verbose) as progress:
        for inputs, targets in data:
            logits, derivatives = slopes(at, inputs)
            classes = slopes.classes(targets) if labels == "data" else None
            squares.append(_SQUARES[slopes.kind](logits, derivatives, classes))
            progress.add(1)
    square = Estimate.of(np.concatenate(squares))
    norm = np.sqrt(square.value)
    # The error of a root is half the relative error of the square.
    stderr = square.stderr / (2 * norm) if norm else square.stderr
    return Estimate(float(norm), float(stderr), np.sqrt(square.samples))


def _squares_of_softmax(
    logits: np.ndarray, slopes: np.ndarray, classes: np.ndarray | None
) -> np.ndarray:
    """Return the expectation of <w, grad ln p>^2 of each example, or its value for a class.

    Args:
        logits: Array `[N, K]`.
        slopes: Array `[N, K]`, the derivatives of the logits along the weights.
        classes: Array `[N]`, the labels, or `None`.
    """
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    # Relative to the label, or the likeliest: where p is 1, what would cancel is 0.
    origin = logits.argmax(axis=1) if classes is None else classes
    slopes = slopes - np.take_along_axis(slopes, origin[:, None], axis=1)
    squared_mean = np.sum(p * slopes, axis=1) ** 2
    return squared_mean if classes is not None else np.sum(p * slopes**2, axis=1) - squared_mean


def _squares_of_sigmoid(
    logits: np.ndarray, slopes: np.ndarray, classes: np.ndarray | None
) -> np.ndarray:
    """Return the same for arrays `[N, 1]`; the labels are signs."""
    logits, slopes = logits[:, 0], slopes[:, 0]
    if classes is None:
        return np.exp(-np.logaddexp(0, logits) - np.logaddexp(0, -logits)) * slopes**2
    return np.exp(-2 * np.logaddexp(0, classes * logits)) * slopes**2


_SQUARES = {"categorical": _squares_of_softmax, "binary": _squares_of_sigmoid}
