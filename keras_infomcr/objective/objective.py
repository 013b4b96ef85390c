"""A Keras model as a pure function of its weights.

Private names of Keras used here, unchanged from 3.10 to 3.15: `_flatten_layers` (the one list of
all layers, nested ones included), `_compute_loss` (calls a user's `compute_loss` with or without
`training`), `_call_has_training_arg`, `_loss_ids`.
"""

import contextlib

import keras

from keras_infomcr import backend
from keras_infomcr.objective.precision import true_float32
from keras_infomcr.objective.weight_penalties import without_weight_penalties
from keras_infomcr.sub_batches import SubBatches


class Objective:
    """The compiled loss L of a model, without weight penalties, as a pure function.

    `objective(weights, state, batch) -> loss, (predictions, new_state)` computes as in training
    and leaves the model as it was: weights, batch-norm statistics, seeds and metrics. In the new
    state `None` stands for what has not changed.

    It computes in float32 at least, whatever the dtype policy: the difference of two gradients
    at points as near as w and w - alpha g is lost in half precision.

    What a layer assigns when it is called is what Keras's training step takes it for. On TensorFlow
    and torch no gradient goes through it, and trainable weights (of `SpectralNormalization`) are
    assigned once in a step, in the main pass: an evaluation is at the weights that it is given. On
    JAX assignments are a part of what is computed from the weights.

    Args:
        model: A compiled `keras.Model`.

    Attributes:
        rewritten: Set of the paths of trainable weights that layers have assigned in evaluations.
        reached: Set of the numbers of the weights that an evaluation had a gradient by; `None` if
            none was noted.
    """

    def __init__(self, model):
        self.model = model
        self.rewritten = set()
        self.reached = None
        # A training step changes them before the sub-batches, which start from the same, are seen.
        self._carried = [(v, keras.ops.copy(v)) for v in self._carried_variables()]

    def weights(self):
        """Return the trainable variables as a list of arrays."""
        return [keras.ops.copy(v) for v in self.model.trainable_variables]

    def state(self):
        """Return the non-trainable variables, seeds included, and any hidden random state."""
        variables = self.model.non_trainable_variables
        return [*(keras.ops.copy(v) for v in variables), *backend.random_state()]

    def __call__(self, weights, state, batch):
        """Return the loss with, as auxiliary, the predictions and the new state."""
        with self.at(weights, state, training=True, rows=batch.rows) as (predict, scope):
            predictions = predict(batch.x)
            loss = self.model._compute_loss(
                batch.x, batch.y, predictions, copied(batch.sample_weight), training=True
            )
            variables = self.model.non_trainable_variables
            values = [scope.get_current_value(v) for v in variables]
            new_state = [None if v is s else v for v, s in zip(values, state)]
            new_state += backend.random_state()
        return loss, (predictions, new_state)

    @contextlib.contextmanager
    def at(self, weights, state, training, rows=None):
        """Open a scope in which the model stands at the given weights and state.

        Args:
            weights: List of arrays, the trainable variables.
            state: List of arrays, as `state()` returns it.
            training: Boolean, as for the model's `call`.
            rows: Indices of the examples whose carried states stateful RNNs begin with.

        Yields:
            The function `x -> predictions` and the `keras.StatelessScope`, which collects updates.
        """
        model = self.model
        kwargs = {"training": training} if model._call_has_training_arg else {}
        num_variables = len(model.non_trainable_variables)
        mapping = [
            *zip(model.metrics_variables, model.metrics_variables),
            *zip(model.trainable_variables, weights),
            *zip(model.non_trainable_variables, state[:num_variables]),
            *self._carried_states(rows),
        ]
        scope = _Scope(self.rewritten, model.trainable_variables, mapping)
        with (
            true_float32(model),
            without_weight_penalties(model),
            backend.without_rematerialization(),
            _loss_ids_forgotten(model),
            _random_state(state[num_variables:]),
            scope,
            backend.modules_at_variables(model),
        ):
            yield lambda x: backend.forward(model, x, **kwargs), scope

    def note_gradients(self, gradients):
        """Take in the gradients of an evaluation, `None` where there is none."""
        found = {k for k, gradient in enumerate(gradients) if gradient is not None}
        self.reached = found | (self.reached or set())

    def sub_batches(self, batch, count):
        """Return `count` nearly equal slices of a batch with their fractions of it."""
        carried = self._carried_variables()
        return SubBatches(batch, count, carried[0].shape[0] if carried else None)

    def seeds(self, state):
        """Return the indices of the seeds and counters in a state, which are not to be averaged.

        A sub-batch takes them from the one before, so that no two of a replica share masks.
        """
        dtypes = [keras.backend.standardize_dtype(array.dtype) for array in state]
        return [k for k, dtype in enumerate(dtypes) if "float" not in dtype]

    def _carried_variables(self):
        """Return the variables in which stateful RNNs carry a state for each row of the batch."""
        layers = [x for x in self.model._flatten_layers() if getattr(x, "stateful", False)]
        states = keras.tree.flatten([getattr(layer, "states", None) for layer in layers])
        return list({id(v): v for v in states if isinstance(v, keras.Variable)}.values())

    def _carried_states(self, rows):
        if rows is None:
            return []
        # A model built by this very step began with states of zero.
        carried = self._carried or [
            (v, keras.ops.zeros(v.shape, v.dtype)) for v in self._carried_variables()
        ]
        return [(v, keras.ops.take(value, rows, axis=0)) for v, value in carried]


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
    _forget_loss_ids(model)
    try:
        yield
    finally:
        _forget_loss_ids(model)


def _forget_loss_ids(model):
    for layer in model._flatten_layers():
        layer._loss_ids.clear()
