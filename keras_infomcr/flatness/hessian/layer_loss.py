"""The loss as a function of what the kernel of one layer is multiplied by."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.keras_internals import all_layers

# Their kernels end in the axis of the neurons, each of which sees all that the other axes hold.
_KINDS = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


class LayerLoss:
    """The loss by Z, where the kernel W of a layer is W + Z R: what `Hessian` asks of a loss.

    The trace of its Hessian depends on R^T R alone, and is that of W + Z W where R^T R = W^T W.
    Here R is triangular, with no more rows than W has rows or columns.

    Args:
        loss: A `LossFunction`.
        layer: String, the name or path of a layer, or `None` for the last.

    Attributes:
        size: Integer, the number of entries of Z.
        dtype: NumPy dtype of its entries.

    Raises:
        ValueError: If there is no such layer.
    """

    def __init__(self, loss: LossFunction, layer: str | None):
        self._loss = loss
        self._index = _index_of_kernel(loss.model, layer)
        self._kernel = loss.model.trainable_variables[self._index]
        matrix = ops.convert_to_numpy(ops.cast(self._kernel, loss.dtype.name))
        matrix = matrix.reshape(-1, matrix.shape[-1])
        self._root = np.linalg.qr(matrix, mode="r")
        self._shape = len(matrix), len(self._root)
        self.size = len(matrix) * len(self._root)
        self.dtype = loss.dtype
        self.point = loss.point
        self.warn_of_misfit = loss.warn_of_misfit

    def hessian_vector_products(self, data: Iterable, at: tuple, vectors: np.ndarray) -> np.ndarray:
        """Return the Hessian by Z, at Z = 0, times each of some vectors, arrays `[k, size]`."""
        vectors = vectors.reshape(-1, *self._shape)
        arrays = np.zeros(self._shape), vectors, self._root
        arrays = [ops.convert_to_tensor(a, self._kernel.dtype) for a in arrays]
        key = "layer_loss", self._loss.batch, self._index
        products = compiled_for(self._loss.model, key, self._products)
        (found,) = self._loss.mean(products, data, (*at, *arrays))
        found = np.zeros_like(vectors) if found is None else found
        return found.reshape(len(vectors), -1)

    def _products(self) -> Callable:
        batch, index, shape = self._loss.batch, self._index, tuple(self._kernel.shape)

        def loss_at(factors, weights, state, root, x, y):
            change = ops.reshape(ops.matmul(factors[0], root), shape)
            weights = [*weights[:index], weights[index] + change, *weights[index + 1 :]]
            return batch.evaluate(weights, state, x, y)[0]

        of_factors = backend.hessian_vector_products(
            loss_at, compiled=not self._loss.model.run_eagerly
        )

        def products(weights, state, zeros, vectors, root, x, y):
            return of_factors([zeros], [vectors], weights, state, root, x, y)

        return products


def _index_of_kernel(model: keras.Model, name: str | None) -> int:
    """Return the number of the kernel of a layer among the trainable weights."""
    layers = [x for x in all_layers(model) if isinstance(x, _KINDS) and x.built]
    kernels = {id(x.kernel): x for x in layers if getattr(x, "groups", 1) == 1}
    found = [(k, kernels.get(id(v))) for k, v in enumerate(model.trainable_variables)]
    found = [(k, layer) for k, layer in found if layer is not None]
    named = [k for k, layer in found if name in (None, layer.path, layer.name)]
    if not named or (name is not None and len(named) > 1):
        raise ValueError(
            "`layer` must be the name or path of one `Dense` layer or convolution without groups "
            f"whose kernel is trained. Received: layer={name!r}, and a model in which such layers "
            f"have the paths {[layer.path for _, layer in found]}."
        )
    return named[-1]
