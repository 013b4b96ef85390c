"""The loss of a batch and its derivatives, as compiled functions of the weights."""

import math
import threading
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.compiled_loss import compiled_loss
from keras_infomcr.flatness.loss.example_values import kind_of_loss
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.objective import Objective


def batch_loss(model: keras.Model, bearer: keras.Model, training: bool) -> "BatchLoss":
    """Return the `BatchLoss` of a model, the same one as long as the model lives."""
    key = "batch_loss", bearer, training
    return compiled_for(model, key, lambda: BatchLoss(model, bearer, training))


class BatchLoss:
    """The loss of a batch, without weight penalties, as functions `(weights, state, ..., x, y)`.

    Weights and state are lists of arrays, x and y structures of arrays. Nothing here changes the
    model, and nothing depends on its weights: it can be kept while the model trains.

    Args:
        model: A built `keras.Model`.
        bearer: What bears the loss, as `resolved_loss` returns it.
        training: Boolean, as for the model's `call`.

    Attributes:
        loss: Returns the loss.
        loss_and_guess: Returns the cross-entropy and the cross-entropy of a uniform guess; the
            guess is `None` for any other loss.
        gradient: Returns the loss, and its gradient by each of the weights.
        outputs: `(weights, state, x)`, returns the outputs.
        clipped: List of pairs, known after an evaluation: the position of an output whose
            probabilities Keras clips, and `"categorical"` or `"binary"`.
    """

    def __init__(self, model: keras.Model, bearer: keras.Model, training: bool):
        self.model = model
        self.bearer = bearer
        self.objective = Objective(model)
        self.clipped = []
        self._training = training
        # Threads evaluate replicas of one model, whose attributes an evaluation replaces.
        self.lock = threading.Lock()
        self.loss = self.compiled(self._loss)
        self.loss_and_guess = self.compiled(self._loss_and_guess)
        self.gradient = self.compiled(backend.value_and_grad(self._with_nothing_else))
        self.outputs = self.compiled(self._outputs)
        self._products = backend.hessian_vector_products(self._loss, compiled=not model.run_eagerly)

    def compiled(self, function: Callable) -> Callable:
        """Return the function, compiled unless the model asks to run eagerly."""
        return function if self.model.run_eagerly else backend.compiled(function)

    def hessian_vector_products(self, weights: list, state: list, stacks: list, x: Any, y: Any):
        """Return the Hessian times vectors `[k, W]`, both as a list of arrays like the weights."""
        return self._products(weights, stacks, state, x, y)

    def evaluate(self, weights: list, state: list, x: Any, y: Any) -> tuple:
        """Return the loss of a batch and the outputs; to be compiled."""
        with self.lock, self.objective.at(weights, state, self._training) as (predict, _):
            outputs, logits = predict_with_logits(self.model, predict, x)
            loss, clipped = compiled_loss(self.bearer, x, y, outputs, logits, self._training)
        known = list(enumerate(keras.tree.flatten(outputs)))
        self.clipped = [(k, kind) for p, kind in clipped for k, output in known if output is p]
        return loss, outputs

    def _loss(self, *args):
        return self.evaluate(*args)[0]

    def _with_nothing_else(self, *args):
        # What `backend.value_and_grad` differentiates returns auxiliary results too.
        return self._loss(*args), ()

    def _outputs(self, weights, state, x):
        with self.lock:
            return self.objective.predict(weights, state, x, self._training)

    def _loss_and_guess(self, weights, state, x, y):
        loss, outputs = self.evaluate(weights, state, x, y)
        function, kind = kind_of_loss(self.bearer, outputs)
        # A `compute_loss` of the user's may take other labels.
        if kind is None or type(self.bearer).compute_loss is not keras.Model.compute_loss:
            return loss, None
        y, outputs = (keras.tree.flatten(a)[0] for a in (y, outputs))
        num_classes = outputs.shape[-1]
        if kind == "binary":
            y, num_classes = ops.reshape(y, ops.shape(outputs)), 2
        # Without what the measured loss holds besides, such as weights and activity penalties.
        loss = ops.mean(function(y, outputs))
        return loss, ops.full_like(loss, math.log(num_classes))
