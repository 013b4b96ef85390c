"""torch: the training step."""

from collections.abc import Callable

import keras
import torch

from keras_infomcr import keras_internals
from keras_infomcr.backend.torch.control_flow import as_tensor, batch_size
from keras_infomcr.backend.torch.differentiation import gradients
from keras_infomcr.backend.trainer import BaseTrainer


class Trainer(BaseTrainer):
    """The trainer of torch."""

    def _call_step(self, step: Callable, data):
        with torch.no_grad():
            # Moved to the device once: the sub-batches are slices of it.
            return step(keras.tree.map_structure(as_tensor, data))

    def _main_pass(self, x, y, sample_weight):
        # Unlike Keras's own, it leaves the `.grad` of parameters alone.
        kwargs = {"training": True} if keras_internals.call_has_training_arg(self) else {}
        with torch.enable_grad():
            y_pred = self(x, **kwargs)
            loss = keras_internals.compute_loss(self, x, y, y_pred, sample_weight)
            keras_internals.loss_tracker(self).update_state(loss, sample_weight=batch_size(x))
            loss = self.optimizer.scale_loss(loss)
            return y_pred, gradients(loss, [v.value for v in self.trainable_variables])

    def _apply_gradients(self, gradients: list) -> None:
        # As in Keras, a parameter that was frozen by its `requires_grad` stays.
        variables = self.trainable_variables
        frozen = [not v.value.requires_grad for v in variables]
        self.optimizer.apply([None if f else g for f, g in zip(frozen, gradients)], variables)
