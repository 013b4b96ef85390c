"""Standard normal draws that a run goes on with where it was interrupted."""

import math
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import validation
from keras_infomcr.regularizers.weights import at_least_float32, cut


class StandardNormals:
    """Draws of a rule, which keeps their seed and their count as its memory.

    Args:
        seed: Integer from 0 to 2^31 - 1, or `None`: drawn as Keras's layers draw theirs, so that
            `keras.utils.set_random_seed` determines it.
    """

    def __init__(self, seed: int | None):
        if seed is not None:
            validation.integer(minimum=0, maximum=2**31 - 1, seed=seed)
        drawn = random.randint(1, 10**9) if seed is None else int(seed)
        # Mixed, for torch adds a seed and a count: seeds side by side would share their draws.
        self._mixed_seed = int(np.random.SeedSequence(drawn).generate_state(1)[0]) >> 1
        # Made here, for no variable may be made in what is traced. It is never moved.
        self._generator = keras.random.SeedGenerator(0)

    def memory(self) -> list[keras.Variable]:
        """Return a new variable that holds the seed and the count of draws, in a list."""
        dtype = self._generator.state.dtype
        start = np.array([self._mixed_seed, 0], dtype)
        return [keras.Variable(start, dtype=dtype, trainable=False, name="noise_seed")]

    def draw(self, weights: list, seed: Any, replica: Any = 0) -> tuple[list, Any]:
        """Return draws like the weights, and the seed of the next draws.

        Args:
            weights: List of arrays.
            seed: The value of the memory, the pair of a `keras.random.SeedGenerator`, which counts
                its draws.
            replica: Integer or scalar array: the replicas of different numbers draw apart.
        """
        state = self._generator.state
        # Replicas start from seeds that lie far apart, and count alike.
        apart = ops.stack([ops.cast(n, state.dtype) for n in (replica * 1_000_003, 0)])
        with keras.StatelessScope([(state, seed + apart)]) as scope:
            # At once: on JAX each draw takes a second or so to compile.
            size = sum(math.prod(w.shape) for w in weights)
            dtype = keras.backend.result_type(*map(at_least_float32, weights))
            draws = cut(keras.random.normal((size,), dtype=dtype, seed=self._generator), weights)
            moved = scope.get_current_value(state)
        return [ops.cast(z, at_least_float32(w)) for z, w in zip(draws, weights)], moved - apart
