"""The Hessian of a model's loss, over all of the data or over trials."""

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import check_sampling, warn
from keras_infomcr.flatness.running.progress import progress_bar
from keras_infomcr.flatness.running.shared import shared

# They share one forward and backward pass, and are all held in memory.
_VECTORS_AT_ONCE = 10
_EXAMPLES_THAT_TELL = 100


class Hessian:
    """The Hessian of the loss over data, known by its products with vectors `[W]`.

    Args:
        loss: A `LossFunction`.
        data: A `Batches`.
        generator: `numpy.random.Generator` of the probes.
        progress: A `keras.utils.Progbar` that counts the products.

    Attributes:
        size: Integer, W.
        largest: Float, the largest size of an entry of the products so far, NaN if one is.
    """

    def __init__(self, loss, data, generator, progress):
        self.size = loss.size
        self.largest = 0.0
        self._loss = loss
        self._at = loss.at()
        self._data = data
        self._generator = generator
        self._progress = progress

    def product(self, vector):
        """Return the product with a vector."""
        return self.products(vector[None])[0]

    def products(self, vectors):
        """Return the products with vectors, arrays `[k, W]`."""
        found = []
        for start in range(0, len(vectors), _VECTORS_AT_ONCE):
            some = vectors[start : start + _VECTORS_AT_ONCE]
            found.append(self._loss.hessian_vector_products(self._data, self._at, some))
            self.largest = float(np.maximum(self.largest, np.max(np.abs(found[-1]))))
            self._progress.add(len(some))
        return np.concatenate(found)

    def direction(self):
        """Return a random vector of any direction."""
        return self._generator.standard_normal(self.size, self._loss.dtype)

    def probes(self, count):
        """Yield random vectors of entries -1 and 1, in arrays `[k, W]` of `count` rows in all."""
        for start in range(0, count, _VECTORS_AT_ONCE):
            size = min(_VECTORS_AT_ONCE, count - start), self.size
            yield (2 * self._generator.integers(0, 2, size, "int8") - 1).astype(self._loss.dtype)


def measure_hessian(
    measure,
    model,
    x,
    y,
    num_products,
    *,
    num_examples=None,
    num_trials=10,
    batch_size=128,
    training=False,
    seed=None,
    verbose=0,
):
    """Measure a model's Hessian, once or for each trial.

    Args:
        measure: Function `Hessian -> result`.
        model: A `keras.Model`.
        x: As for `hessian_trace`.
        y: As for `hessian_trace`.
        num_products: Integer, how many products it takes at most.
        num_examples: As for `hessian_trace`.
        num_trials: As for `hessian_trace`.
        batch_size: As for `hessian_trace`.
        training: As for `hessian_trace`.
        seed: As for `hessian_trace`.
        verbose: As for `hessian_trace`.

    Returns:
        List of results: one for all of the data, or one a trial.
    """
    check_sampling(num_examples, num_trials, batch_size, seed, verbose)
    validation.boolean(training=training)
    loss = shared(("loss", training), lambda: LossFunction(model, training), model)
    generator = np.random.default_rng(seed)
    trials = trial_batches(x, y, num_examples, num_trials, batch_size, seed)
    loss.warn_of_misfit(_first_batches(trials[0]), loss.at())
    with progress_bar(num_products * len(trials), verbose) as progress:
        hessians = [Hessian(loss, data, generator, progress) for data in trials]
        results = [measure(hessian) for hessian in hessians]
    _check_size(min(hessian.largest for hessian in hessians), loss.dtype)
    return results


def _first_batches(data):
    """Yield as many batches as hold the examples that tell whether the model fits."""
    count = 0
    for batch in data:
        yield batch
        count += len(keras.tree.flatten(batch)[0])
        if count >= _EXAMPLES_THAT_TELL:
            return


def _check_size(largest, dtype):
    """Warn of numbers so small that the dtype has lost their digits, or all of them."""
    limits = np.finfo(dtype)
    if largest < limits.tiny / limits.eps:
        warn(
            f"The curvature is zero, or too small for {dtype}, in which what is below "
            f"{limits.tiny:.0e} loses its digits: no entry of a Hessian-vector product exceeds "
            f"{largest:.0e}. If it should not be zero, raise the loss by `loss_weights` and divide "
            "the measure by as much."
        )


def mean_estimate(trials):
    """Return the `Estimate` of the samples of one trial, or of the means of several trials."""
    return Estimate.of(trials[0] if len(trials) == 1 else [np.mean(t) for t in trials])
