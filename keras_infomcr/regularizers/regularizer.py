"""What `RegularizedModel.compile(regularizer=...)` takes."""

import abc

import keras
import numpy as np

from keras_infomcr import backend, validation
from keras_infomcr.scalars import to_float


class Regularizer(abc.ABC):
    """Base class of the regularisers.

    A regulariser is a rule that turns a model's objective and a batch into a gradient to add to
    the training gradient. It holds hyper-parameters alone, no reference to a model.

    Subclasses define `__call__(objective, batch)`, which returns an object with

    * `value`: the value of the regulariser, a scalar, for the logs;
    * `gradient`: list like the weights, `None` where there is none. It is multiplied by
      `strength` and added to the training gradient;

    and `get_config()`.

    Args:
        strength: Float, 0 or greater. The coefficient of the regulariser. It is live: assigned
            at any time, also inside `fit`, it takes effect with the next batch and without
            re-tracing.

    Attributes:
        strength: A `keras.Variable`. Assign a float to change its value.
        num_sub_batches: Integer, into how many sub-batches a batch should be cut. Defaults to 1.
    """

    num_sub_batches = 1

    def __init__(self, strength: float):
        validation.non_negative(strength=strength)
        # So wide that float64 weights feel the float that was given.
        dtype = backend.widest_float()
        self._strength = keras.Variable(
            np.array(strength, dtype), dtype=dtype, trainable=False, name="strength"
        )

    @property
    def strength(self):
        return self._strength

    @strength.setter
    def strength(self, value):
        value = to_float(value) if hasattr(value, "shape") else value
        validation.non_negative(strength=value)
        self._strength.assign(np.array(value, self._strength.dtype))

    @abc.abstractmethod
    def __call__(self, objective, batch):
        """Return the value and the gradient on a batch."""

    def gives_main_gradient(self, model):
        """Return whether the result of `__call__` also holds the gradient of the loss itself."""
        return False

    def check(self, model):  # noqa: B027 (most regularisers have nothing to check)
        """Raise or warn if the model, as compiled, does not fit the regulariser."""

    def check_weights(self, model):  # noqa: B027
        """Raise if the weights do not fit the regulariser; called before each step."""

    @abc.abstractmethod
    def get_config(self):
        """Return the constructor's arguments as a dictionary."""

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    @classmethod
    def from_config(cls, config):
        """Make a regulariser from what `get_config` returned."""
        return cls(**config)
