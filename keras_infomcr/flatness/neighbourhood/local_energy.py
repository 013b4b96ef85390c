"""The local energy: how far noise on the weights raises the loss and the 0-1 error."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.loss.energy import Energy
from keras_infomcr.flatness.running.checks import check_sampling
from keras_infomcr.flatness.running.progress import progress_bar
from keras_infomcr.flatness.running.shared import shared


@dataclasses.dataclass(frozen=True)
class LocalEnergy:
    """What `local_energy` returns: floats, or arrays `[S]` for a grid of S sigmas.

    Attributes:
        value: The mean rise of the loss.
        stderr: Its standard error over the draws of the noise, NaN for a single one.
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
    reestimate_statistics: bool = False,
    num_examples: int | None = None,
    batch_size: int = 128,
    seed: int | None = None,
    verbose: int = 0,
) -> LocalEnergy:
    """Measure how far noise on the weights raises the loss and the 0-1 error.

        delta E(sigma) = E_z[E(w + sigma z * w)] - E(w),    z ~ N(0, I)

    All trainable weights are disturbed, each for itself; batch normalisation is in inference
    mode. All sigmas see the same z. The model is left as it is.

    Reference: Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko and Zecchina,
    "Entropic Gradient Descent Algorithms and Wide Flat Minima", ICLR 2021
    (https://arxiv.org/abs/2006.07897).

    Args:
        model: A compiled and built `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        sigma: Float, at least 0, or a sequence of such: the strength of the noise. Defaults to
            0.1.
        num_samples: Integer, at least 1. Draws of z, each a forward pass over the data for each
            sigma. The standard error falls as its square root. Defaults to 20.
        kind: `"multiplicative"`, as above, or `"additive"`: E(w + sigma z). Defaults to
            `"multiplicative"`.
        reestimate_statistics: Boolean, whether batch normalisation gets, for the disturbed weights
            and for w, the statistics that all the data together give it: another pass for each.
            Defaults to `False`.
        num_examples: Integer, at least 1: so many examples are drawn, of data in batches the
            first are read; or `None`: all are measured. Defaults to `None`.
        batch_size: Integer, at least 1: examples that go through the model together. Defaults
            to 128.
        seed: Integer or `None`, of all draws. Defaults to new draws each time.
        verbose: 0 or 1. With 1, a progress bar counts the passes over the data. Defaults to 0.

    Returns:
        A `LocalEnergy`.

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
    validation.boolean(reestimate_statistics=reestimate_statistics)
    check_sampling(num_examples, 1, batch_size, seed, verbose)
    energy = shared("energy", lambda: Energy(model), model)
    (data,) = trial_batches(x, y, num_examples, 1, batch_size, seed)
    generator = np.random.default_rng(seed)
    weights, state = energy.weights(), energy.state()
    scale = weights if kind == "multiplicative" else 1

    def energies(at):
        there = energy.reestimated(data, at, state) if reestimate_statistics else state
        progress.add(1)
        return energy.energies(data, at, there)

    rises = np.zeros((num_samples, len(sigmas), 2))
    with progress_bar(num_samples * len(sigmas) + 1, verbose) as progress:
        undisturbed = np.array(energies(weights))
        for rise in rises:
            noise = scale * generator.standard_normal(energy.size, energy.dtype)
            rise[:] = [energies(weights + energy.dtype.type(s) * noise) for s in sigmas]
            rise -= undisturbed
    means = rises.mean(axis=0)
    stderrs = np.array([[standard_error(r) for r in rows] for rows in rises.transpose(1, 2, 0)])
    columns = means[:, 0], stderrs[:, 0], means[:, 1], stderrs[:, 1], sigmas
    return LocalEnergy(*(c if np.ndim(sigma) else float(c[0]) for c in columns))
