"""Replicated-SGD: copies of a model that are trained together and pulled to their centre."""

from typing import Any

import keras
from keras import ops

from keras_infomcr import backend, keras_internals, validation
from keras_infomcr.models.replicas import (
    are_equal,
    check_model,
    groups,
    make_replica,
    mean,
    mean_square_distance,
)
from keras_infomcr.models.shares import joined_outputs, shares, shares_of_outputs
from keras_infomcr.objective import Batch
from keras_infomcr.scalars import to_float

# What the coupling grows by over a run.
_GROWTH = 1e4


@keras.saving.register_keras_serializable("keras_infomcr")
class ReplicatedModel(backend.Trainer, keras.Model):
    """Several replicas of a model, trained together and pulled to their centre.

    Replicated-SGD looks for wide minima: where the mean of several good networks is a good network
    too. In a step each of the y replicas sees a share of the batch of its own, follows the gradient
    of its own mean loss as the optimizer does, and is then pulled to the centre, the mean of the
    replicas:

        w_a <- m + (w_a - m) / (1 + 2 r g),   m = mean of the w_a,

    with r the learning rate and g the coupling. This is the implicit step of the penalty
    g * sum over a of ||w_a - m||^2, which no g makes unstable. (The published step, an explicit
    one, diverges on small networks, where g is large.) It leaves the centre where it is.

    To all but training the model is its centre: `evaluate`, `predict`, `export` and the validation
    of `fit` use that, with the mean of the replicas' batch-norm statistics. The batch is shared, so
    that an epoch is one pass over the data: train y times as many epochs for replicas that have
    each seen the data as often as a plain model would.

    In the logs of `fit`, `loss` and metrics are those of all replicas, each on its share;
    `replica_0_loss` and so on are the losses of each, weight penalties included; `distance` is the
    distance of the replicas to the centre after the epoch (the root of the mean over replicas of
    the squared Euclidean norm over all trainable weights), and `coupling` is g in the epoch.

    Args:
        model: A `keras.Model`, built: Functional, Sequential, or subclassed with `get_config`. It
            becomes the `centre`. The first replica starts from its weights, the others from
            weights of their own, drawn by the initialisers; what is frozen is the same in all.
        num_replicas: Integer, at least 1. Defaults to 3. With 1, training is Keras's own.
        coupling: Float, 0 or greater: g in the first epoch. Or `"auto"`: the training loss of the
            first step over the mean squared distance after it, as published; it needs a loss
            greater than 0. Defaults to `"auto"`.
        growth: Float, greater than 0. What g is multiplied by after each epoch of `fit`. Or
            `"auto"`: such that g grows by 1e4 over the `epochs` of a `fit`, as published. Defaults
            to `"auto"`.
        same_start: Boolean, whether all replicas start from the weights of `model`, which needs a
            number for `coupling`. Defaults to `False`.
        name: String, name of the model. Defaults to the name of `model`.
        **kwargs: As for `keras.Model`.

    Attributes:
        centre: `model`, whose weights are the means over the replicas: a plain model. They are up
            to date after each step.
        replicas: Tuple of plain models.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If an argument is out of its range; if `model` is not built, has no trainable
            weights, cannot be copied by `keras.models.clone_model`, or overrides what `fit`,
            `evaluate` and `predict` depend on, such as `train_step`; or if `coupling="auto"` and
            the replicas start from the same weights.

    Example:

    ```python
    network = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model = ReplicatedModel(network, num_replicas=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=3 * 32, epochs=3 * 20)
    model.centre.save_weights("centre.weights.h5")  # loads into a plain model
    ```

    Reference: Baldassi et al., "Unreasonable Effectiveness of Learning Neural Networks", PNAS 2016
    (https://arxiv.org/abs/1605.06444); Pittorino et al., "Entropic Gradient Descent Algorithms and
    Wide Flat Minima", ICLR 2021 (https://arxiv.org/abs/2006.07897).
    """

    _evaluating = False

    def __init__(
        self,
        model,
        num_replicas=3,
        coupling="auto",
        growth="auto",
        same_start=False,
        name=None,
        **kwargs,
    ):
        check_model(model)
        validation.integer(minimum=1, num_replicas=num_replicas)
        if not _is_auto(coupling):
            validation.non_negative(coupling=coupling)
        if not _is_auto(growth):
            validation.positive(growth=growth)
        validation.boolean(same_start=same_start)
        super().__init__(
            name=name or model.name, dtype=model.dtype_policy, autocast=model.autocast, **kwargs
        )
        self.num_replicas = int(num_replicas)
        self.coupling, self.growth, self.same_start = coupling, growth, bool(same_start)
        self.centre = model
        self.replicas = tuple(make_replica(model, k, same_start) for k in range(num_replicas))
        # Less than 0: not known before the first step.
        start = keras.initializers.Constant(-1.0 if _is_auto(coupling) else coupling)
        self._present_coupling = self.add_weight(
            shape=(), initializer=start, dtype="float32", trainable=False, name="coupling"
        )
        self._losses_of_replicas = [
            keras.metrics.Mean(name=f"replica_{k}_loss") for k in range(num_replicas)
        ]
        self.built = True
        if _is_auto(coupling) and num_replicas > 1 and are_equal(*self.replicas[:2]):
            raise ValueError(
                '`coupling` must be a number where replicas start from the same weights: "auto" '
                "divides by their distance. Received: coupling='auto' with "
                f"same_start={self.same_start} and replicas that are equal. Pass a number, or "
                "`same_start=False` and a model whose initialisers have no fixed seed."
            )
        self._update_centre()

    def call(self, inputs, training=None):
        if not training:
            return _forward(self.centre, inputs, False)
        batch = Batch(inputs)
        parts = shares(batch, self.num_replicas)
        outputs = [_forward(r, part.x, True) for r, (_, part) in zip(self.replicas, parts)]
        return joined_outputs(outputs, backend.batch_size(batch))

    @property
    def trainable_variables(self):
        return [v for r in self.replicas for v in r.trainable_variables] if self.trainable else []

    @property
    def non_trainable_variables(self):
        return _others(self.variables, self.trainable_variables)

    @property
    def trainable_weights(self):
        return self.trainable_variables

    @property
    def non_trainable_weights(self):
        return _others(self.weights, self.trainable_variables)

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
        if _is_auto(self.coupling):
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

    def export(self, *args, **kwargs):
        """Export the centre, as `keras.Model.export`."""
        return self.centre.export(*args, **kwargs)

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "model": keras.saving.serialize_keras_object(self.centre),
            "num_replicas": self.num_replicas,
            "coupling": self.coupling,
            "growth": self.growth,
            "same_start": self.same_start,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)

    def compile_from_config(self, config):
        # Overridden since Keras does not compile a loaded model whose `compile` is not its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


class _EndOfEpoch(keras.callbacks.Callback):
    """Log how far the replicas are apart, and let the coupling grow."""

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        variable = model._present_coupling
        coupling = to_float(variable)
        if logs is not None:
            logs["distance"], logs["coupling"] = model._distance(), max(coupling, 0.0)
        auto = _GROWTH ** (1 / self.params["epochs"])
        variable.assign(coupling * (auto if _is_auto(model.growth) else model.growth))


def _with_end_of_epoch(callbacks: Any) -> Any:
    """Put our callback before the user's, which see what it writes."""
    if isinstance(callbacks, keras.callbacks.CallbackList):  # used as it is, again and again
        if not any(isinstance(x, _EndOfEpoch) for x in callbacks.callbacks):
            callbacks.callbacks.insert(0, _EndOfEpoch())
            callbacks.callbacks[0].set_params(callbacks.params)
            callbacks.callbacks[0].set_model(callbacks.model)
        return callbacks
    return [_EndOfEpoch(), *keras.tree.flatten(callbacks or [])]


def _is_auto(argument):
    return isinstance(argument, str) and argument == "auto"


def _forward(model, x, training):
    kwargs = {"training": training} if keras_internals.call_has_training_arg(model) else {}
    return backend.forward(model, x, **kwargs)


def _others(variables, left_out):
    ids = {id(v) for v in left_out}
    return [v for v in variables if id(v) not in ids]
