"""Replicated-SGD: copies of a model that are trained together and pulled to their centre."""

import keras

from keras_infomcr import backend, keras_internals, validation
from keras_infomcr.models.replicas import are_equal, check_model, make_replica
from keras_infomcr.models.replicated_training import ReplicatedTraining, is_auto
from keras_infomcr.models.shares import joined_outputs, shares
from keras_infomcr.objective import Batch


@keras.saving.register_keras_serializable("keras_infomcr")
class ReplicatedModel(ReplicatedTraining, keras.Model):
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
        centre: `model`, a plain model, whose weights are the means over the replicas, and are
            assigned in each step.
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
        if not is_auto(coupling):
            validation.non_negative(coupling=coupling)
        if not is_auto(growth):
            validation.positive(growth=growth)
        validation.boolean(same_start=same_start)
        super().__init__(
            name=name or model.name, dtype=model.dtype_policy, autocast=model.autocast, **kwargs
        )
        self.num_replicas = int(num_replicas)
        self.coupling, self.growth = (a if is_auto(a) else float(a) for a in (coupling, growth))
        self.same_start = bool(same_start)
        self.centre = model
        self.replicas = tuple(make_replica(model, k, same_start) for k in range(num_replicas))
        # Less than 0: not known before the first step.
        start = keras.initializers.Constant(-1.0 if is_auto(coupling) else coupling)
        self._present_coupling = self.add_weight(
            shape=(), initializer=start, dtype="float32", trainable=False, name="coupling"
        )
        self._losses_of_replicas = [
            keras.metrics.Mean(name=f"replica_{k}_loss") for k in range(num_replicas)
        ]
        self.built = True
        if is_auto(coupling) and num_replicas > 1 and are_equal(*self.replicas[:2]):
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


def _forward(model, x, training):
    kwargs = {"training": training} if keras_internals.call_has_training_arg(model) else {}
    return backend.forward(model, x, **kwargs)


def _others(variables, left_out):
    ids = {id(v) for v in left_out}
    return [v for v in variables if id(v) not in ids]
