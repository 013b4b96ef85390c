"""The products of one Hessian with vectors, counted and watched."""

from collections.abc import Iterator

import keras
import numpy as np

from keras_infomcr.flatness.data.examples import Batches
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.checks import warn

# They share one forward and backward pass, and are all held in memory.
_VECTORS_AT_ONCE = 10


class HessianProducts:
    """The Hessian of the loss over data at the weights as they are, by its products with vectors.

    Args:
        loss: A `LossFunction`.
        data: A `Batches`, all of the data or one trial.
        generator: `numpy.random.Generator` of the probes.
        progress: A `keras.utils.Progbar` that counts the products.

    Attributes:
        size: Integer, W.
        largest: Float, the largest size of an entry of the products so far, NaN if one is.
    """

    def __init__(
        self,
        loss: LossFunction,
        data: Batches,
        generator: np.random.Generator,
        progress: keras.utils.Progbar,
    ):
        self.size = loss.size
        self.largest = 0.0
        self._loss = loss
        self._at = loss.point()
        self._data = data
        self._generator = generator
        self._progress = progress

    def product(self, vector: np.ndarray) -> np.ndarray:
        """Return the product with a vector `[W]`."""
        return self.products(vector[None])[0]

    def products(self, vectors: np.ndarray) -> np.ndarray:
        """Return the products with vectors, arrays `[k, W]`."""
        found = []
        for start in range(0, len(vectors), _VECTORS_AT_ONCE):
            some = vectors[start : start + _VECTORS_AT_ONCE]
            found.append(self._loss.hessian_vector_products(self._data, self._at, some))
            self.largest = float(np.maximum(self.largest, np.max(np.abs(found[-1]))))
            self._progress.add(len(some))
        return np.concatenate(found)

    def gradient(self) -> np.ndarray:
        """Return the gradient of the loss, an array `[W]`."""
        _, gradient = self._loss.gradient(self._data, self._at)
        self._progress.add(1)
        return gradient

    def direction(self, near: np.ndarray | None = None) -> np.ndarray:
        """Return a random vector of any direction, or half of which is the sum of others.

        A vector of signs would be orthogonal to too much: to all differences of two equal
        features, one time in two.
        """
        drawn = self._generator.standard_normal(self.size, self._loss.dtype)
        if near is None:
            return drawn
        # Without the random half nothing would be seen of an eigenvalue that has overtaken others.
        near = np.sum(near, axis=0, dtype=self._loss.dtype)
        return near / (np.linalg.norm(near) or 1.0) + drawn / np.linalg.norm(drawn)

    def probes(self, count: int) -> Iterator[np.ndarray]:
        """Yield random vectors of entries -1 and 1, in arrays `[k, W]` of `count` rows in all."""
        for start in range(0, count, _VECTORS_AT_ONCE):
            size = min(_VECTORS_AT_ONCE, count - start), self.size
            yield (2 * self._generator.integers(0, 2, size, "int8") - 1).astype(self._loss.dtype)


def check_size(largest: float, dtype: np.dtype):
    """Warn of numbers so small that the dtype has lost their digits, or all of them."""
    limits = np.finfo(dtype)
    if largest < limits.tiny / limits.eps:
        warn(
            f"The curvature is zero, or too small for {dtype}, in which what is below "
            f"{limits.tiny:.0e} loses its digits: no entry of a Hessian-vector product exceeds "
            f"{largest:.0e}. If it should not be zero, raise the loss by `loss_weights` and divide "
            "the measure by as much."
        )
