"""One step of Keras's `train_step`, regularised.

Private names of Keras used here, unchanged from 3.10 to 3.15: `_compute_loss`, `_loss_tracker`,
`_symbolic_build`, `_flatten_layers`, and the functions for masks.
"""

import keras
from keras import ops
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from keras_infomcr import backend
from keras_infomcr.objective import copied
from keras_infomcr.scalars import times


def train_step(objective, regularizer, monitor, data):
    """Take one step of Keras's `train_step` with the regulariser's gradient added.

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
    batch = x, y, copied(sample_weight)
    regularizer.check_weights(model)
    if regularizer.gives_main_gradient(model):
        if not all(layer.built for layer in model._flatten_layers()):
            model._symbolic_build(data_batch=batch)
        result = regularizer(objective, batch)
        y_pred, gradients = _main_pass_from(result, model, x, y, sample_weight)
    else:
        y_pred, gradients = backend.main_pass(model, x, y, sample_weight)
        result = regularizer(objective, batch)
    monitor.update(result.value, backend.batch_size(batch))
    factor = _unit(model.optimizer) * ops.cast(regularizer.strength, backend.widest_float())
    # A weight that the loss does not depend on stays without a gradient.
    gradients = [g if g is None else _add(g, r, factor) for g, r in zip(gradients, result.gradient)]
    backend.apply(model.optimizer, gradients, model.trainable_variables)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _main_pass_from(result, model, x, y, sample_weight):
    """Make predictions, gradients and state of a full batch from those of its slices."""
    penalty, penalty_gradients = _weight_penalties(model.trainable_variables)
    unit = _unit(model.optimizer)
    gradients = [
        _add(None if g is None else times(unit, g), p, unit)
        for g, p in zip(result.loss_gradient, penalty_gradients)
    ]
    size = backend.batch_size((x, y))
    y_pred = keras.tree.map_structure(lambda *p: _concatenate(p, size), *result.predictions)
    if model.loss is not None or type(model).compute_loss is not keras.Model.compute_loss:
        # For what is tracked on the way to the total: losses of single outputs, a user's metrics.
        model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    loss = result.loss + ops.cast(penalty, result.loss.dtype)
    model._loss_tracker.update_state(loss, sample_weight=backend.batch_size(x))
    variables, of_metrics = model.non_trainable_variables, {id(v) for v in model.metrics_variables}
    for variable, value in zip(variables, result.state):
        if value is not None and id(variable) not in of_metrics:
            variable.assign(value)
    backend.set_random_state(result.state[len(variables) :])
    return y_pred, gradients


def _weight_penalties(variables):
    """Return the sum of the weight penalties and its gradients."""
    if not any(v.regularizer for v in variables):
        return 0.0, [None] * len(variables)

    def penalty(weights):
        terms = [ops.sum(v.regularizer(w)) for v, w in zip(variables, weights) if v.regularizer]
        return sum(terms), None

    (value, _), gradients = backend.value_and_grad(penalty)([ops.copy(v) for v in variables])
    return value, gradients


def _unit(optimizer):
    """Return what a gradient of 1 is to an optimizer that unscales, then sums over replicas."""
    one = optimizer.scale_loss(ops.ones(()))
    return ops.cast(one, backend.widest_float()) / backend.num_replicas()


def _add(gradient, term, factor):
    """Return gradient + factor * term, `None` counting as zero."""
    if term is None:
        return gradient
    term = times(factor, term)
    return term if gradient is None else backend.add(gradient, term)


def _concatenate(parts, size):
    """Join the predictions of slices, without the surplus ones, which stand last."""
    whole = ops.concatenate(parts, axis=0)[:size]
    masks = [get_keras_mask(part) for part in parts]
    if all(mask is not None for mask in masks):
        set_keras_mask(whole, ops.concatenate(masks, axis=0)[:size])
    return whole
