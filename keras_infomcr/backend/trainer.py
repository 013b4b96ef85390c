"""What the training step of a `RegularizedModel` asks of the backend: the base of its trainers.

`keras.Model` derives from the trainer of Keras's backend. In the same way `RegularizedModel`
derives from `keras_infomcr.backend.Trainer`, which stands before `keras.Model` among its bases: a
method of the trainer that Keras has too extends Keras's, by `super()`. A trainer overrides what its
framework needs, and nothing else.

The methods have private names, for users derive from these classes.
"""

from collections.abc import Callable
from typing import Any

import keras


class BaseTrainer:
    """The trainer of a framework that needs nothing beyond Keras's own."""

    def _variables_in_step(self) -> list[keras.Variable]:
        """Return the variables, apart from Keras's own, that a training step reads and assigns.

        They are no weights: files of weights do not hold them.
        """
        return []

    def _sync_variables(self) -> None:
        """Let the variables of a model that is in `fit` hold their present values.

        Called before a variable is read or assigned from outside of a step. Where variables hold
        their values at all times there is nothing to do.
        """

    def _call_step(self, step: Callable, *args: Any) -> Any:
        """Return what Keras's `train_step(*args)` returns, of a step written for all backends.

        Args:
            step: Function `data -> logs` that reads and assigns variables.
            *args: The arguments of Keras's `train_step`: the data, on JAX after the state.
        """
        raise NotImplementedError

    def _main_pass(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, list]:
        """Run Keras's own forward and backward pass, with all its effects on variables.

        Returns:
            The predictions, and the gradients by the trainable variables: scaled by the
            optimizer's `scale_loss`, `None` where there is none, perhaps sparse.
        """
        raise NotImplementedError

    def _apply_gradients(self, gradients: list) -> None:
        """Take the optimizer's step with gradients by the trainable variables."""
        raise NotImplementedError
