"""A Keras model as a pure function of its weights."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras

from keras_infomcr import backend
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.keras_internals import call_has_training_arg, compute_loss, forget_loss_ids
from keras_infomcr.objective.batch import Batch, SubBatches
from keras_infomcr.objective.precision import scales_loss, true_float32
from keras_infomcr.objective.weight_penalties import (
    penalty_and_gradients,
    without_weight_penalties,
)


class Objective:
    """The compiled loss L of a model, without weight penalties, as a pure function.

    `objective(weights, state, batch) -> loss, (predictions, new_state)` computes as in training
    and leaves the model as it was: weights, batch-norm statistics, seeds and metrics. In the new
    state `None` stands for what has not changed.

    What a layer assigns when it is called is what Keras's training step takes it for. On TensorFlow
    and torch no gradient goes through it, and trainable weights (of `SpectralNormalization`) are
    assigned once in a step, in the main pass: an evaluation is at the weights that it is given. On
    JAX assignments are a part of what is computed from the weights.

    Args:
        model: A compiled `keras.Model`.
        float32: Boolean, whether to compute in float32 at least, whatever the dtype policy: the
            difference of two gradients at points as near as w and w - alpha g is lost in half
            precision. Defaults to `True`.

    Attributes:
        rewritten: Set of the paths of trainable weights that layers have assigned in evaluations.
        reached: Set of the numbers of the weights that an evaluation had a gradient by; `None` if
            none was noted.
    """

    def __init__(self, model: keras.Model, float32: bool = True):
        self.model = model
        self.rewritten: set[str] = set()
        self.reached: set[int] | None = None
        self._float32 = float32

    def weights(self) -> list:
        """Return the trainable variables as a list of arrays."""
        return [keras.ops.copy(v) for v in self.model.trainable_variables]

    def state(self) -> list:
        """Return the non-trainable variables, seeds included, and any hidden random state."""
        variables = self.model.non_trainable_variables
        return [*(keras.ops.copy(v) for v in variables), *backend.random_state()]

    def __call__(self, weights: list, state: list, batch: Batch) -> tuple:
        """Return the loss with, as auxiliary, the predictions and the new state."""
        with self.at(weights, state, training=True) as (predict, scope):
            predictions = predict(batch.x)
            loss = compute_loss(
                self.model,
                batch.x,
                batch.y,
                predictions,
                copied(batch.sample_weight),
                training=True,
            )
            variables = self.model.non_trainable_variables
            values = [scope.get_current_value(v) for v in variables]
            new_state = [None if v is s else v for v, s in zip(values, state)]
            new_state += backend.random_state()
        return loss, (predictions, new_state)

    def evaluate(self, weights: list, state: list, batch: Batch) -> Evaluation:
        """Return the loss, its gradients, the predictions and the new state."""
        (_, (loss, predictions, new_state)), gradients = backend.value_and_grad(self._scaled)(
            weights, state, batch
        )
        if self._has_scale:
            scale = self.model.optimizer.scale_loss(keras.ops.ones(()))
            gradients = [
                None if g is None else g / keras.ops.cast(scale, g.dtype) for g in gradients
            ]
        self._note(gradients)
        return Evaluation(loss, gradients, predictions, new_state)

    def _scaled(self, weights, state, batch):
        """Return the loss times the optimizer's scale, lest gradients vanish in half precision."""
        loss, (predictions, new_state) = self(weights, state, batch)
        scaled = self.model.optimizer.scale_loss(loss) if self._has_scale else loss
        return scaled, (loss, predictions, new_state)

    @property
    def _has_scale(self):
        return not self._float32 and scales_loss(self.model.optimizer)

    def evaluate_with_product(self, weights: list, state: list, batch: Batch) -> tuple:
        """Return the same, the Hessian times the gradient g, and ||g||^2."""
        product = backend.value_grad_and_hessian_product(self)
        (loss, (predictions, new_state)), gradients, products = product(weights, None, state, batch)
        self._note(gradients)
        squares = [keras.ops.sum(keras.ops.square(g)) for g in gradients if g is not None]
        here = Evaluation(loss, gradients, predictions, new_state)
        return here, products, keras.ops.cast(sum(squares), loss.dtype)

    def hessian_product(self, weights: list, state: list, batch: Batch) -> Callable[[list], list]:
        """Return the function v -> H v, of which each call shares one pass over the batch."""
        gradients, product = backend.linearized_gradient(self)(weights, state, batch)
        self._note(gradients)
        return product

    def curvature_gradient(self, weights: list, vector: list, state: list, batch: Batch) -> list:
        """Return the gradient of v^T H v by the weights, v held constant."""
        return backend.curvature_gradient(self)(weights, vector, state, batch)

    def predict(self, weights: list, state: list, x: Any, training: bool = False) -> Any:
        """Return the outputs of the model at the given weights and state."""
        with self.at(weights, state, training) as (predict, _):
            return predict(x)

    @contextlib.contextmanager
    def at(self, weights: list, state: list, training: bool):
        """Open a scope in which the model stands at the given weights and state.

        Args:
            weights: List of arrays, the trainable variables.
            state: List of arrays, as `state()` returns it.
            training: Boolean, as for the model's `call`.

        Yields:
            The function `x -> predictions` and the `keras.StatelessScope`, which collects updates.
        """
        model = self.model
        kwargs = {"training": training} if call_has_training_arg(model) else {}
        num_variables = len(model.non_trainable_variables)
        mapping = [
            *zip(model.metrics_variables, model.metrics_variables),
            *zip(model.trainable_variables, weights),
            *zip(model.non_trainable_variables, state[:num_variables]),
        ]
        scope = _Scope(self.rewritten, model.trainable_variables, mapping)
        with (
            true_float32(model) if self._float32 else contextlib.nullcontext(),
            without_weight_penalties(model),
            backend.without_rematerialization(),
            _loss_ids_forgotten(model),
            _random_state(state[num_variables:]),
            scope,
            backend.modules_at_variables(model),
        ):
            yield lambda x: backend.forward(model, x, **kwargs), scope

    def penalty_gradients(self, weights: list) -> list:
        """Return the gradients of the weight penalties, `None` where there is none."""
        return penalty_and_gradients(self.model.trainable_variables, weights)[1]

    def mean_over_replicas(self, arrays: list) -> list:
        """Return the means over the replicas of a list of arrays and `None`, in a rule."""
        known = [k for k, array in enumerate(arrays) if array is not None]
        means = backend.mean_over_replicas([arrays[k] for k in known])
        found = dict(zip(known, means))
        return [found.get(k) for k in range(len(arrays))]

    def replica_index(self) -> Any:
        """Return the number of the replica that a rule runs on, an integer or a scalar array."""
        return backend.replica_index()

    def _note(self, gradients):
        found = {k for k, gradient in enumerate(gradients) if gradient is not None}
        self.reached = found | (self.reached or set())

    def sub_batches(self, batch: Batch, count: int) -> SubBatches:
        """Return `count` nearly equal slices of a batch with their fractions of it."""
        return SubBatches(batch, count)

    def seeds(self, state):
        """Return the indices of the seeds and counters in a state, which are not to be averaged.

        A sub-batch takes them from the one before, so that no two of a replica share masks.
        """
        dtypes = [keras.backend.standardize_dtype(array.dtype) for array in state]
        return [k for k, dtype in enumerate(dtypes) if "float" not in dtype]


class _Scope(keras.StatelessScope):
    """The scope of an evaluation.

    Args:
        rewritten: Set that receives the paths of trainable weights that are assigned.
        trainable: List of the trainable variables.
        mapping: As for `keras.StatelessScope`.
    """

    def __init__(self, rewritten, trainable, mapping):
        super().__init__(mapping, collect_losses=True)
        self._rewritten = rewritten
        self._trainable = {id(v) for v in trainable}

    def add_update(self, update):
        variable, value = update
        if id(variable) in self._trainable:
            self._rewritten.add(variable.path)
        if not backend.assigns_in_place():
            super().add_update(update)
        elif id(variable) not in self._trainable:
            super().add_update((variable, keras.ops.stop_gradient(value)))


def copied(sample_weight):
    """Return a copy of sample weights: on torch Keras's losses multiply masks into them."""
    return keras.tree.map_structure(
        lambda a: None if a is None else keras.ops.copy(a), sample_weight
    )


@contextlib.contextmanager
def _random_state(state):
    before = backend.random_state()
    backend.set_random_state(state)
    try:
        yield
    finally:
        backend.set_random_state(before)


@contextlib.contextmanager
def _loss_ids_forgotten(model):
    """Keep Keras from dropping an activity penalty.

    It drops what a layer's last call has added, known by `id`, which a new object may have got.
    """
    forget_loss_ids(model)
    try:
        yield
    finally:
        forget_loss_ids(model)
