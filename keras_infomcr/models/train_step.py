"""One step of Keras's `train_step`, regularised."""

import warnings
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.keras_internals import all_layers, compute_loss, loss_tracker, symbolic_build
from keras_infomcr.models.monitor import RegularizerMonitor
from keras_infomcr.objective import Batch, Objective, copied, penalty_and_gradients, scales_loss
from keras_infomcr.regularizers import Regularizer, Step
from keras_infomcr.scalars import times


def train_step(
    objective: Objective, regularizer: Regularizer, monitor: RegularizerMonitor, data: Any
) -> dict:
    """Take one step of Keras's `train_step` with what the regulariser makes of the batch.

    Args:
        objective: The model as an `Objective`.
        regularizer: The `Regularizer`.
        monitor: The `RegularizerMonitor` that the value is reported to.
        data: The batch, what `keras.utils.unpack_x_y_sample_weight` takes.

    Returns:
        The logs, as Keras's `train_step` returns them.
    """
    model = objective.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    batch = Batch(x, y, copied(sample_weight))
    replaces_main_pass = regularizer.replaces_main_pass(model)
    if replaces_main_pass and not all(layer.built for layer in all_layers(model)):
        symbolic_build(model, tuple(batch))
    if not (replaces_main_pass and model.trainable_variables):
        y_pred, gradients = model._main_pass(x, y, sample_weight)
    if not model.trainable_variables:  # as is known now of a model that this step has built
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    made = model.build_regularizer()
    if made and regularizer.memory and model.jit_compile and not backend.makes_variables_in_steps():
        raise ValueError(
            "A model must be built before a regulariser that keeps a memory trains it under XLA. "
            f"Received: an unbuilt model and {type(regularizer).__name__}. Call the model on a "
            "batch first."
        )
    num_parallel_steps = backend.num_parallel_steps(model)
    unit = _gradient_unit(model.optimizer, num_parallel_steps)

    def on_replica(batch):
        step = regularizer(objective, batch, [ops.copy(v) for v in regularizer.memory])
        num_weights = len(model.trainable_variables)
        _check_step(regularizer, step, replaces_main_pass, num_weights, monitor.norms)
        strength = ops.cast(regularizer.strength, backend.widest_float())
        terms = _scaled(unit * strength, step.gradient or [None] * num_weights)
        if step.main is None:
            return (step.value, step.logs, terms, list(step.memory)), None
        if step.instead is None:
            followed = _added(_scaled(unit, step.main.gradients), terms)
        else:
            followed = _scaled(unit, _between(step.main.gradients, step.instead, strength))
        state = step.main.state or [None] * len(objective.state())
        training = _scaled(unit, step.main.gradients) if monitor.norms else []
        of_main = training, step.main.loss, state
        means = step.value, step.logs, followed, list(step.memory), *of_main
        return means, step.main.predictions

    means, predictions = backend.over_replicas(on_replica)(batch)
    value, logs, terms, memory, *main_pass = means
    batch_size = backend.batch_size(batch)
    monitor.update(value, logs, batch_size, num_parallel_steps)
    for variable, new in zip(regularizer.memory, memory):
        of_floats = "float" in keras.backend.standardize_dtype(variable.dtype)
        # So that all replicas remember the same, and a file holds what they all go on from.
        variable.assign(backend.mean_over_steps(new) if of_floats else new)
    if replaces_main_pass:
        y_pred, (training, *main_pass) = predictions, main_pass
        penalty_gradients = _finish_main_pass(model, x, y, y_pred, sample_weight, *main_pass)
        if regularizer.includes_penalties:
            penalty_gradients = [None] * len(terms)
        penalties = _scaled(unit, penalty_gradients)
        added = [None if t is None else _add(t, -g) for t, g in zip(terms, training)]
        training = [p if g is None else _add(g, p) for p, g in zip(penalties, training)]
        gradients = [p if t is None else _add(t, p) for p, t in zip(penalties, terms)]
    else:
        _check_reached(objective, gradients)
        added, training = terms, gradients
        gradients = _added(gradients, terms)
    if monitor.norms:
        monitor.update_norm(_norm(added) / _norm(training), batch_size)
    model._apply_gradients(gradients)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def refuse_stateful_layers(model: keras.Model):
    """Refuse recurrent layers that carry a state for each row of a batch to the next batch.

    Slices of a batch have other rows. Keras itself trains such layers on TensorFlow alone.
    """
    stateful = [x.name for x in all_layers(model) if getattr(x, "stateful", False)]
    if stateful:
        raise ValueError(
            "Recurrent layers must not be stateful where a regulariser evaluates parts of a batch. "
            f"Received: layers with stateful=True {stateful}. Make them with `stateful=False`, or "
            "call `compile(regularizer=None)`."
        )


def _check_step(regularizer, step, replaces_main_pass, num_weights, norms):
    """Refuse what breaks the contract of `Regularizer`, and would fail far from its cause."""
    rule = type(regularizer).__name__  # while tracing, its configuration cannot be read
    if not isinstance(step, Step):
        raise TypeError(
            f"A regulariser must return a `Step`. Received: {step!r} (of type {type(step)}) from "
            f"{rule}."
        )
    if (step.main is not None) != replaces_main_pass:
        raise ValueError(
            "`Step.main` must be given if, and only if, `replaces_main_pass` returns `True`. "
            f"Received: main={step.main!r} and replaces_main_pass={replaces_main_pass} from "
            f"{rule}."
        )
    if step.instead is not None and (step.main is None or step.gradient is not None):
        raise ValueError(
            "`Step.instead` must be given with `Step.main`, and without `Step.gradient`. Received: "
            f"main={step.main!r} and gradient={step.gradient!r} from {rule}."
        )
    if norms and step.main is not None and step.gradient is None and step.instead is None:
        raise ValueError(
            "`log_regularizer_norm=True` needs a rule that evaluates the training gradient. "
            f"Received: {rule}, which evaluates another gradient alone. Compile with "
            "`log_regularizer_norm=False`."
        )
    for name, gradients in (
        ("Step.gradient", step.gradient),
        ("Step.instead", step.instead),
        ("Step.main.gradients", step.main and step.main.gradients),
    ):
        if gradients is not None and len(gradients) != num_weights:
            raise ValueError(
                f"`{name}` must hold a gradient, or `None`, for each trainable variable. Received: "
                f"{len(gradients)} gradients for {num_weights} variables from {rule}."
            )
    if sorted(step.logs) != sorted(regularizer.further_logs):
        raise ValueError(
            "`Step.logs` must hold a value for each name of the regulariser's `further_logs`. "
            f"Received: {sorted(step.logs)} for {sorted(regularizer.further_logs)} from {rule}."
        )
    if len(step.memory) != len(regularizer.memory):
        raise ValueError(
            "`Step.memory` must hold a new value for each variable of the regulariser's `memory`. "
            f"Received: {len(step.memory)} values for {len(regularizer.memory)} variables from "
            f"{rule}."
        )


def _check_reached(objective, gradients):
    """Refuse a model whose evaluations do not see a weight that the training gradient sees."""
    if objective.reached is None or not backend.functions_may_hide_weights():
        return
    variables = objective.model.trainable_variables
    hidden = [
        variable.path
        for k, (variable, gradient) in enumerate(zip(variables, gradients))
        # The penalty on a weight is a part of the training loss alone.
        if k not in objective.reached and gradient is not None and variable.regularizer is None
    ]
    if hidden:
        raise ValueError(
            "The loss of a sub-batch must have a gradient by each weight that the training loss "
            f"has one by. Received: no gradient by {hidden}. On TensorFlow a function made by "
            "`keras.remat` hides its weights: make the layer under `keras.RematScope` instead."
        )


def _finish_main_pass(model, x, y, y_pred, sample_weight, loss, state):
    """Do what else a pass over the batch does, once the slices have given its loss and state.

    Returns:
        The gradients of the weight penalties.
    """
    if model.loss is not None or type(model).compute_loss is not keras.Model.compute_loss:
        # For what is tracked on the way to the total: losses of single outputs, a user's metrics.
        compute_loss(model, x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    trainable = model.trainable_variables
    penalty, gradients = penalty_and_gradients(trainable, [ops.copy(v) for v in trainable])
    loss = loss + ops.cast(penalty, loss.dtype)
    loss_tracker(model).update_state(loss, sample_weight=backend.batch_size(x))
    variables, of_metrics = model.non_trainable_variables, {id(v) for v in model.metrics_variables}
    layers = [x for x in all_layers(model) if getattr(x, "synchronized", False)]
    shared = {id(v) for layer in layers for v in layer.non_trainable_variables}
    for variable, value in zip(variables, state):
        if value is not None and id(variable) not in of_metrics:
            variable.assign(backend.mean_over_steps(value) if id(variable) in shared else value)
    backend.set_random_state(state[len(variables) :])
    return gradients


def _gradient_unit(optimizer, num_parallel_steps):
    """Return the factor to multiply a gradient by before it is passed to the optimizer.

    It is the loss scale, which the optimizer divides by, over the number of parallel steps, whose
    gradients the optimizer adds up; the float 1.0 where there is neither.
    """
    if num_parallel_steps == 1 and not scales_loss(optimizer):
        return 1.0
    one = ops.cast(optimizer.scale_loss(ops.ones(())), backend.widest_float())
    return one / num_parallel_steps


def _norm(gradients):
    """Return the Euclidean norm of the mean over the parallel steps."""
    dense = [ops.convert_to_tensor(g, sparse=False) for g in gradients if g is not None]
    means = [ops.cast(backend.mean_over_steps(g), backend.widest_float()) for g in dense]
    return ops.sqrt(sum(ops.sum(ops.square(g)) for g in means))


def _between(gradients, others, share):
    """Return (1 - share) gradients + share others."""
    return [
        g if g is None or h is None else backend.interpolated(g, h, share)
        for g, h in zip(gradients, others)
    ]


def _scaled(factor, gradients):
    if isinstance(factor, float) and factor == 1:
        return gradients  # sparing a pass over all weights
    return [None if g is None else times(factor, g) for g in gradients]


def _added(gradients, terms):
    """Add terms. A weight that the loss does not depend on stays without a gradient."""
    return [g if g is None else _add(g, t) for g, t in zip(gradients, terms)]


def _add(gradient, term):
    """Return gradient + term, a term of `None` counting as zero."""
    return gradient if term is None else backend.add_to_gradient(gradient, term)
