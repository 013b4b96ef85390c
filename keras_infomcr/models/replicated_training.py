"""How a `ReplicatedModel` is trained, and what `fit` logs of it."""

from typing import Any

import keras
from keras import ops

from keras_infomcr import backend, keras_internals
from keras_infomcr.models.replicas import groups, mean, mean_square_distance
from keras_infomcr.models.shares import shares_of_outputs
from keras_infomcr.objective import Batch
from keras_infomcr.scalars import to_float

# What the coupling grows by over a run.
_GROWTH = 1e4


class ReplicatedTraining(backend.Trainer):
    """The trainer of a `ReplicatedModel`, which derives from it ahead of `keras.Model`."""

    # Whether the present step or logs are of `evaluate`.
    _evaluating = False

    @property
    def losses(self):
        """A list of the centre's penalties, and one of the penalties of each replica."""
        models = (self.centre, *self.replicas)
        return keras_internals.losses_of_step(self) or [m.losses for m in models]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        penalties = self.losses
        if not training:
            return self._total_loss(Batch(y_pred, y, sample_weight), penalties[0])
        size = backend.batch_size(Batch(y_pred))
        parts = shares_of_outputs(Batch(y_pred, y, sample_weight), self.num_replicas)
        followed, reported = 0.0, 0.0
        for (fraction, part), penalty, tracker in zip(
            parts, penalties[1:], self._losses_of_replicas
        ):
            loss = self._total_loss(part, penalty)
            fraction = ops.cast(fraction, loss.dtype)
            # A replica that is left without an example stays where it is.
            followed += ops.sign(fraction) * loss
            reported += fraction * loss
            whole = ops.stop_gradient(loss) * backend.num_parallel_steps(self)
            tracker.update_state(whole, sample_weight=fraction * ops.cast(size, loss.dtype))
        # The value is the mean over the examples; the gradients are those of each mean loss.
        return followed - ops.stop_gradient(followed) + ops.stop_gradient(reported)

    def _total_loss(self, batch, penalties):
        compiled = keras_internals.compile_loss(self)
        losses = [compiled(batch.y, batch.x, batch.sample_weight)] if compiled else []
        losses += [keras_internals.additional_loss(self, penalty) for penalty in penalties]
        losses = [ops.cast(loss, losses[0].dtype) for loss in losses]
        # As Keras adds them, to the bit.
        return losses[0] if len(losses) == 1 else ops.sum(losses) if losses else ops.zeros(())

    def train_step(self, *args):
        def step(data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            optimizer = self.optimizer
            rate, moves = ops.copy(optimizer.learning_rate), ops.copy(optimizer.iterations)
            y_pred, gradients = self._main_pass(x, y, sample_weight)
            self._apply_gradients(gradients)
            # Not where gradients are being accumulated, or a `LossScaleOptimizer` skips a step.
            self._couple(ops.where(optimizer.iterations > moves, rate, 0.0))
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

        return self._call_step(step, *args)

    def _couple(self, rate):
        """Pull the replicas to their centre, and let that be their mean."""
        coupling = ops.copy(self._present_coupling)
        if is_auto(self.coupling):
            square = mean_square_distance(self.replicas)
            loss = backend.mean_over_steps(keras_internals.loss_tracker(self).result())
            start = ops.where(square > 0, ops.cast(loss, square.dtype) / square, -1.0)
            coupling = ops.where(coupling < 0, ops.cast(start, coupling.dtype), coupling)
            self._present_coupling.assign(coupling)
        self._update_centre()
        force = 2 * ops.cast(rate, coupling.dtype) * ops.maximum(coupling, 0.0)
        share = 1 / (1 + 1 / force)  # force / (1 + force), and right for 0 and infinity too
        for weights, centre in groups(self.replicas, self.centre, "trainable_variables"):
            for weight in weights:
                weight.assign(backend.interpolated(ops.copy(weight), ops.copy(centre), share))

    def _update_centre(self):
        for variables, centre in groups(self.replicas, self.centre, "weights"):
            if "float" in centre.dtype:
                centre.assign(mean(variables))

    def _distance(self) -> float:
        return to_float(ops.sqrt(mean_square_distance(self.replicas)))

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        *args,
        **kwargs,
    ):
        callbacks = _with_end_of_epoch(callbacks)
        history = super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)
        self._update_centre()  # an optimizer with `use_ema=True` has given other weights
        return history

    def evaluate(self, *args, **kwargs):
        return self._in_evaluation(super().evaluate, *args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        return self._in_evaluation(super().test_on_batch, *args, **kwargs)

    def _in_evaluation(self, function, *args, **kwargs):
        self._evaluating = True
        try:
            return function(*args, **kwargs)
        finally:
            self._evaluating = False

    def get_metrics_result(self):
        logs = super().get_metrics_result()
        if self._evaluating:  # of the centre alone
            logs = {k: v for k, v in logs.items() if k not in self._names_of_losses()}
        return logs

    def _names_of_losses(self):
        return {metric.name for metric in self._losses_of_replicas}

    def compile_from_config(self, config):
        # Overridden since Keras does not compile a loaded model whose `compile` is not its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


def is_auto(argument: Any) -> bool:
    """Return whether an argument is `"auto"`."""
    return isinstance(argument, str) and argument == "auto"


class _EndOfEpoch(keras.callbacks.Callback):
    """Log how far the replicas are apart, and let the coupling grow."""

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        variable = model._present_coupling
        coupling = to_float(variable)
        if logs is not None:
            logs["distance"], logs["coupling"] = model._distance(), max(coupling, 0.0)
        auto = _GROWTH ** (1 / self.params["epochs"])
        variable.assign(coupling * (auto if is_auto(model.growth) else model.growth))


def _with_end_of_epoch(callbacks: Any) -> Any:
    """Put our callback before the user's, which see what it writes."""
    if isinstance(callbacks, keras.callbacks.CallbackList):  # used as it is, again and again
        if not any(isinstance(x, _EndOfEpoch) for x in callbacks.callbacks):
            callbacks.callbacks.insert(0, _EndOfEpoch())
            callbacks.callbacks[0].set_params(callbacks.params)
            callbacks.callbacks[0].set_model(callbacks.model)
        return callbacks
    return [_EndOfEpoch(), *keras.tree.flatten(callbacks or [])]
