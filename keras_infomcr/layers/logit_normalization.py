"""The normalisation of logits that InfoMCR's metric uses to compare networks."""

import keras
from keras import ops

from keras_infomcr import validation


@keras.saving.register_keras_serializable("keras_infomcr")
class LogitNormalization(keras.layers.Layer):
    """Divide each example's logits by `scale` times their L2 norm.

        z -> z / (scale ||z||_2)

    so that all examples have logits of norm 1 / `scale`. A row of zeros stays zero, with zero
    gradient. Computed in float32 at least.

    Args:
        scale: Float, greater than 0. Defaults to 0.04, the reference's (norm 25).
        **kwargs: As for `keras.layers.Layer`.

    Input shape: `(batch_size, ..., num_classes)`.

    Output shape: The same.

    Raises:
        ValueError: If `scale` is out of its range.

    Example:

    >>> LogitNormalization(scale=0.5)(keras.ops.array([[3.0, 4.0]]))  # [[1.2, 1.6]]

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Table 3, and its code (https://github.com/SeanJia/InfoMCR).
    """

    def __init__(self, scale: float = 0.04, **kwargs):
        validation.positive(scale=scale)
        super().__init__(**kwargs)
        self.scale = scale
        self.supports_masking = True
        self._build_at_init()

    def call(self, inputs):
        return ops.cast(normalize_logits(inputs, self.scale), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


def normalize_logits(logits, scale):
    """Return logits / (scale ||logits||_2), along the last axis, in float32 at least."""
    if keras.backend.standardize_dtype(logits.dtype) != "float64":
        logits = ops.cast(logits, "float32")
    # Relative to the largest entry, so that squares neither overflow nor vanish.
    largest = ops.stop_gradient(ops.max(ops.abs(logits), axis=-1, keepdims=True))
    relative = logits / ops.where(largest > 0, largest, ops.ones_like(largest))
    squares = ops.sum(ops.square(relative), axis=-1, keepdims=True)
    # 1 in place of 0 before the root: its gradient at 0 is infinite.
    norm = ops.sqrt(ops.where(squares > 0, squares, ops.ones_like(squares)))
    return ops.where(squares > 0, relative / (norm * scale), ops.zeros_like(relative))
