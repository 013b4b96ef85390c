"""The local energy: how far noise on the weights raises the loss and the 0-1 error."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate, standard_error
from keras_infomcr.flatness.loss.batch_norm_statistics import reestimated_state
from keras_infomcr.flatness.loss.zero_one_error import LossAndError
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class LocalEnergy(Estimate):
    """What `local_energy` returns: floats, or arrays `[S]` for a grid of S sigmas.

    Attributes:
        value: The mean rise of the loss.
        stderr: Its standard error over the draws of the noise, NaN for a single one.
        samples: Array `[num_samples]`, or `[num_samples, S]` for a grid: the rise of the loss at
            each draw of the noise.
        error: The mean rise of the 0-1 error, a fraction: the measure of the reference. NaN if
            the loss is no cross-entropy of one output.
        error_stderr: Its standard error.
        sigma: The strength of the noise.
    """

    value: float | np.ndarray
    stderr: float | np.ndarray
    error: float | np.ndarray
    error_stderr: float | np.ndarray
    sigma: float | np.ndarray


def local_energy(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sigma: float | Sequence[float] = 0.1,
    num_samples: int = 20,
    kind: str = "multiplicative",
    reestimate: bool = False,
    num_examples: int | None = None,
    chunk_size: int = 128,
    loss: Any = None,
    seed: int | None = None,
    verbose: int = 0,
) -> LocalEnergy:
    """Measure how far noise on the weights raises the loss and the 0-1 error.

        delta E(sigma) = E_z[E(w + sigma z * w)] - E(w),    z ~ N(0, I)

    E is the loss, and the 0-1 error likewise. All trainable weights are disturbed, each by a number
    of its own. Batch normalisation is in inference mode. All sigmas see the same z. The model is
    left as it is.

    Reference: Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko and Zecchina,
    "Entropic Gradient Descent Algorithms and Wide Flat Minima", ICLR 2021
    (https://arxiv.org/abs/2006.07897).

    Args:
        model: As for `hessian_trace`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        sigma: Float, at least 0, or a sequence of such numbers: the strength of the noise.
            Defaults to 0.1.
        num_samples: Integer, at least 1. Draws of z, each a forward pass over the data for each
            sigma. The standard error falls as its square root. Defaults to 20.
        kind: `"multiplicative"`, as above, or `"additive"`: E(w + sigma z). Defaults to
            `"multiplicative"`.
        reestimate: Boolean, whether batch normalisation gets, for the disturbed weights and for w,
            the statistics that all the data together give it: another pass for each. Defaults to
            `False`.
        num_examples: Integer, at least 1: so many examples are drawn; if the data come in
            batches, the first are read. Or `None`: all examples are measured. Defaults to `None`.
        chunk_size: Integer, at least 1: examples that go through the model together. Defaults
            to 128.
        loss: As for `hessian_trace`.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the passes over the data. Defaults to 0.

    Returns:
        A `LocalEnergy`, which `keras_infomcr.flatness.plot.local_energy` draws.

    Raises:
        TypeError: As `hessian_trace`.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = local_energy(model, x_train, y_train, sigma=[0.05, 0.1, 0.2], seed=0)
    print(result.error)
    ```
    """
    grid = np.ravel(np.array(sigma, object))
    if np.ndim(sigma) > 1 or not grid.size:
        raise ValueError(f"`sigma` must be a number or a sequence. Received: sigma={sigma!r}")
    for number in grid:
        validation.non_negative(sigma=number)
    sigmas = grid.astype("float64")
    validation.integer(minimum=1, num_samples=num_samples)
    validation.one_of("multiplicative", "additive", kind=kind)
    validation.boolean(reestimate=reestimate)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    function = LossAndError(model, loss)
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    generator = np.random.default_rng(seed)
    weights, state = function.weights(), function.state()
    scale = weights if kind == "multiplicative" else 1

    def energies(at):
        there = reestimated_state(function, data, at, state) if reestimate else state
        progress.add(1)
        return function.loss_and_error(data, at, there)

    rises = np.zeros((num_samples, len(sigmas), 2))
    with progress_bar(num_samples * len(sigmas) + 1, verbose) as progress:
        undisturbed = np.array(energies(weights))
        for rise in rises:
            noise = scale * generator.standard_normal(function.size, function.dtype)
            rise[:] = [energies(weights + function.dtype.type(s) * noise) for s in sigmas]
            rise -= undisturbed
    if not np.ndim(sigma):
        return _local_energy(rises[:, 0, 0], rises[:, 0, 1], float(sigmas[0]))
    return _local_energy(rises[:, :, 0], rises[:, :, 1], sigmas)


def _local_energy(losses: np.ndarray, errors: np.ndarray, sigma: float | np.ndarray) -> LocalEnergy:
    """Return the means of rises, arrays `[num_samples]`, or `[num_samples, S]` for a grid."""

    def stderr(rises):
        return standard_error(rises) if rises.ndim == 1 else np.array([*map(stderr, rises.T)])

    (value, error) = (np.mean(rises, axis=0) for rises in (losses, errors))
    if losses.ndim == 1:
        value, error = float(value), float(error)
    return LocalEnergy(value, stderr(losses), losses, error, stderr(errors), sigma)
