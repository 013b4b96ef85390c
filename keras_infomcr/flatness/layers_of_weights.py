"""The weights of each layer, as entries of a vector of all weights."""

import math
from collections.abc import Sequence

import keras
import numpy as np

from keras_infomcr.core.trace import inner_products


def layer_of(variable: keras.Variable) -> str:
    """Return the path of the layer of a variable."""
    return variable.path.rpartition("/")[0]


class LayersOfWeights:
    """Which entries of vectors `[W]`, ordered like a list of variables, are of which layer.

    Args:
        variables: List of `keras.Variable`s.

    Attributes:
        layers: Tuple of L strings, the paths of the layers. Layers of the same path are taken
            together.
        num_weights: Tuple of L integers, the numbers of their weights.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        owners = [layer_of(v) for v in variables]
        self.layers = tuple(dict.fromkeys(owners))
        sizes = [math.prod(v.shape) for v in variables]
        ends = np.cumsum(sizes)
        self._parts = [
            (self.layers.index(owner), slice(end - size, end))
            for owner, size, end in zip(owners, sizes, ends)
        ]
        counts = np.zeros(len(self.layers), int)
        for layer, part in self._parts:
            counts[layer] += part.stop - part.start
        self.num_weights = tuple(map(int, counts))

    def dots(self, vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the inner products of rows of arrays `[k, W]` by layer, an array `[k, L]`."""
        found = np.zeros((len(vectors), len(self.layers)))
        for layer, part in self._parts:
            found[:, layer] += inner_products(vectors[:, part], others[:, part])
        return found
