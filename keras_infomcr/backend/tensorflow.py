"""TensorFlow: differentiation of functions of weights, and the training step.

Private names of Keras used here, unchanged from 3.10 to 3.15, because Keras's own `train_step`
uses them too: `_compute_loss`, `_loss_tracker`, `_call_has_training_arg`, `_symbolic_build`,
`_flatten_layers`, `_keras_mask`.
"""

import keras
import tensorflow as tf


def value_and_grad(function):
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""

    def differentiated(weights, *args):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            value, auxiliary = function(weights, *args)
        gradients = tape.gradient(value, weights)
        return (value, auxiliary), [None if g is None else _dense(g) for g in gradients]

    return differentiated


def jacobian(function, coupled, compiled=True):
    """Return `f(weights, *args) -> (values, rows)`."""

    def whole(weights, *args):
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(weights)
            values = function(weights, *args)
        selectors = tf.eye(tf.shape(values)[0], dtype=values.dtype)
        rows = tf.map_fn(
            lambda selector: _gradients(tape, values, weights, selector),
            selectors,
            fn_output_signature=_specs(weights),
        )
        return values, rows

    def by_example(weights, *args):
        def one(example):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                value = function(weights, *tf.nest.map_structure(lambda a: a[None], example))[0]
            return value, _gradients(tape, value, weights)

        signature = tf.TensorSpec((), tf.float64), _specs(weights)
        return tf.map_fn(one, args, fn_output_signature=signature)

    rows_of = whole if coupled else by_example
    return tf.function(rows_of, reduce_retracing=True, autograph=False) if compiled else rows_of


def _gradients(tape, value, weights, selector=None):
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(value, weights, selector, unconnected_gradients=zero)
    return [_dense(g) for g in gradients]


def _specs(weights):
    return [tf.TensorSpec(w.shape, w.dtype) for w in weights]


def sub_batches(batch, count, fixed_size=None):
    """Cut a batch into `count` contiguous slices, as `numpy.array_split` does.

    A batch of B < count examples gives B slices of one example; where B is not known while
    tracing, the surplus slices repeat an example with fraction 0.

    Args:
        batch: Structure of dense, ragged or sparse tensors and `None`.
        count: Integer, number of slices.
        fixed_size: Integer, the size of the batch, for models that see no other: each slice is
            tiled to it. `None` for all other models.

    Returns:
        List of `(fraction, slice, rows)`: `fraction` a float64 scalar, b_i/B; `rows` the indices
        of the slice's examples in the batch where it is tiled, else `None`.
    """
    size = fixed_size or _batch_size(batch)
    known = isinstance(size, int)
    if known:
        count = min(count, size)
    if fixed_size and size % count:
        raise ValueError(
            "The batch size must be a multiple of `num_sub_batches` where recurrent layers are "
            f"stateful. Received: batch size={size}, num_sub_batches={count}. Change one of them."
        )
    base, surplus = size // count, size % count
    slices = []
    for i in range(count):
        start = i * base + _minimum(i, surplus)
        length = base + (int(i < surplus) if known else tf.cast(i < surplus, tf.int32))
        fraction = tf.cast(length, tf.float64) / tf.cast(size, tf.float64)
        if fixed_size:
            rows = start + tf.range(size) % length
            part = keras.tree.map_structure(lambda a, r=rows: _map_array(a, tf.gather, r), batch)
        else:
            rows = None
            if not known:
                start, length = tf.minimum(start, size - 1), tf.maximum(length, 1)
            stop = start + length
            part = keras.tree.map_structure(
                lambda a, s=start, e=stop: _map_array(a, _slice, s, e), batch
            )
        slices.append((fraction, part, rows))
    return slices


def num_replicas():
    """Return the number of replicas that share the batch."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def low_precision_products():
    """Return whether a GPU here computes float32 matrix products in TensorFloat-32."""
    if not tf.config.experimental.tensor_float_32_execution_enabled():
        return False
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return any(d.get("compute_capability", (0, 0)) >= (8, 0) for d in details)


def train_step(objective, regularizer, monitor, data):
    """Take one step of Keras's `train_step` with the regulariser's gradient added.

    Args:
        objective: The model as an `Objective`.
        regularizer: The `Regularizer`.
        monitor: The `RegularizerMonitor` that the value is reported to.
        data: What Keras hands to `train_step`.

    Returns:
        The logs, as Keras's `train_step` returns them.
    """
    model = objective.model
    data = keras.tree.map_structure(_as_tensor, data)
    x, y, sample_weight = batch = keras.utils.unpack_x_y_sample_weight(data)
    if regularizer.gives_main_gradient(model):
        if not all(layer.built for layer in model._flatten_layers()):
            model._symbolic_build(data_batch=batch)
        result = regularizer(objective, batch)
        y_pred, gradients = _main_pass_from(result, model, x, y, sample_weight)
    else:
        y_pred, gradients = _main_pass(model, x, y, sample_weight)
        result = regularizer(objective, batch)
    monitor.update(result.value, _batch_size(batch))
    factor = _unit(model.optimizer) * tf.cast(regularizer.strength, tf.float64)
    gradients = [_add(g, r, factor) for g, r in zip(gradients, result.gradient)]
    model.optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _main_pass(model, x, y, sample_weight):
    """Run Keras's forward and backward pass, the only one that changes state."""
    kwargs = {"training": True} if model._call_has_training_arg else {}
    with tf.GradientTape() as tape:
        y_pred = model(x, **kwargs)
        loss = model._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )
        _track_loss(model, loss * num_replicas(), x)
        loss = model.optimizer.scale_loss(loss)
    return y_pred, tape.gradient(loss, model.trainable_variables)


def _main_pass_from(result, model, x, y, sample_weight):
    """Make predictions, gradients and state of a full batch from those of its slices."""
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        penalty = sum((tf.reduce_sum(v.regularizer(v)) for v in variables if v.regularizer), 0.0)
    penalty_gradients = [None] * len(variables)
    if tf.is_tensor(penalty):
        penalty_gradients = tape.gradient(penalty, variables)
    unit = _unit(model.optimizer)
    gradients = [
        _add(None if g is None else _times(unit, g), p, unit)
        for g, p in zip(result.loss_gradient, penalty_gradients)
    ]
    size = _batch_size((x, y))
    y_pred = tf.nest.map_structure(lambda *p: _concatenate(p, size), *result.predictions)
    if model.loss is not None or type(model).compute_loss is not keras.Model.compute_loss:
        # For what is tracked on the way to the total: losses of single outputs, a user's metrics.
        model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    _track_loss(model, result.loss + tf.cast(penalty, result.loss.dtype), x)
    of_metrics = {id(v) for v in model.metrics_variables}
    for variable, values in zip(model.non_trainable_variables, zip(*result.states)):
        if id(variable) not in of_metrics:
            variable.assign(_merge(values, result.fractions))
    return y_pred, gradients


def _unit(optimizer):
    """Return what a gradient of 1 is to an optimizer that unscales, then sums over replicas."""
    return tf.cast(optimizer.scale_loss(tf.ones(())), tf.float64) / num_replicas()


def _merge(values, fractions):
    """Average batch-norm statistics over the slices; advance a seed once."""
    if not values[0].dtype.is_floating:
        return values[0]
    return sum(_times(f, v) for f, v in zip(fractions, values))


def _track_loss(model, loss, x):
    model._loss_tracker.update_state(loss, sample_weight=_batch_size(x))


def _add(gradient, term, factor):
    """Return gradient + factor * term; the rows of a sparse gradient stay the same rows."""
    if term is None:
        return gradient
    term = _times(factor, _dense(term))
    if gradient is None:
        return term
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient + term
    # Rows may repeat (Keras's optimizers depend on how): each repeat takes an equal share.
    indices = tf.cast(gradient.indices, tf.int32)
    ones = tf.ones_like(indices, dtype=term.dtype)
    repeats = tf.gather(tf.math.unsorted_segment_sum(ones, indices, tf.shape(term)[0]), indices)
    share = tf.reshape(repeats, [-1] + [1] * (len(term.shape) - 1))
    values = gradient.values + tf.gather(term, indices) / share
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def _times(scalar, array):
    return tf.cast(scalar, array.dtype) * array


def _dense(gradient):
    return tf.convert_to_tensor(gradient)


def _as_tensor(array):
    """Turn the NumPy arrays of `train_on_batch(run_eagerly=True)` into tensors."""
    composite = isinstance(array, tf.__internal__.CompositeTensor)
    return array if array is None or composite else tf.convert_to_tensor(array)


def _batch_size(batch):
    """Return the number of examples, a Python integer where it is known while tracing."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    if first.shape[0] is not None:
        return int(first.shape[0])
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.cast(tf.shape(first)[0], tf.int32)


def _minimum(a, b):
    return min(a, b) if isinstance(b, int) else tf.minimum(a, b)


def _map_array(array, function, *args):
    return None if array is None else function(array, *args)


def _slice(array, start, stop):
    if not isinstance(array, tf.SparseTensor):
        return array[start:stop]
    shape = tf.cast(array.dense_shape, tf.int64)
    start, stop = tf.cast(start, tf.int64), tf.cast(stop, tf.int64)
    begin = tf.concat([[start], tf.zeros_like(shape[1:])], axis=0)
    part = tf.sparse.slice(array, begin, tf.concat([[stop - start], shape[1:]], axis=0))
    static = [None, *array.shape[1:]]
    return tf.SparseTensor(
        part.indices, part.values, tf.ensure_shape(part.dense_shape, [len(static)])
    )


def _concatenate(parts, size):
    """Join the predictions of slices, without the surplus ones, which stand last."""
    whole = tf.concat(parts, axis=0)[:size]
    masks = [getattr(part, "_keras_mask", None) for part in parts]
    if all(mask is not None for mask in masks):
        whole._keras_mask = tf.concat(masks, axis=0)[:size]
    return whole
