"""TensorFlow: differentiation of functions of weights, and the training step.

Private names of Keras used here, unchanged from 3.10 to 3.15, because Keras's own `train_step`
uses them too: `_compute_loss`, `_loss_tracker`, `_call_has_training_arg`, `_distribute_strategy`;
and `_in_multi_worker_mode` of a `tf.distribute.Strategy`, which Keras asks too.
"""

import collections
import contextlib
import threading

import keras
import tensorflow as tf

from keras_infomcr.backend.tensorflow_draws import check_draws_of_eager_model, draws_refused
from keras_infomcr.backend.tensorflow_graphs import cond, looped, traced_once  # noqa: F401


def value_and_grad(function):
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""

    def differentiated(weights, *args):
        with _alone():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                with draws_refused():
                    value, auxiliary = function(weights, *args)
            gradients = tape.gradient(value, weights)
        return (value, auxiliary), _dense(gradients, weights)

    return differentiated


def hessian_vector_product(function):
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""
    first_order = value_and_grad(function)

    def product(weights, vector, *args):
        with _alone(), _twice_differentiable():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                value, gradients = first_order(weights, *args)
                slope = tf.zeros((), weights[0].dtype)
                for g, v in zip(gradients, vector or gradients):
                    if g is not None:
                        slope += tf.cast(tf.reduce_sum(g * tf.stop_gradient(v)), slope.dtype)
            products = tape.gradient(slope, weights)
        return value, gradients, _dense(products, weights)

    return product


def hessian_vector_products(function, compiled=True):
    """Return `f(weights, vectors, *args) -> products`."""

    def products(weights, vectors, *args):
        with _alone(), _twice_differentiable():
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(weights)
                with tf.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(weights)
                    with draws_refused():
                        value = function(weights, *args)
                gradients = inner.gradient(value, weights)
                known = [k for k, g in enumerate(gradients) if g is not None]
                dense = _dense(gradients, weights)
                gradients = [dense[k] for k in known]

            def product(vector):
                return _gradients(tape, gradients, weights, [vector[k] for k in known])

            return tf.map_fn(product, vectors, fn_output_signature=_specs(weights))

    return tf.function(products, reduce_retracing=True, autograph=False) if compiled else products


def _alone():
    """Return the replica's context in a strategy that has no other."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return contextlib.nullcontext()
    local_replicas = len(tf.distribute.get_strategy().extended.worker_devices)
    with tf.Graph().as_default():  # which no scope of a strategy has been entered for
        strategy = tf.distribute.get_strategy()
    # With its number among those of this process, by which variables know which copy is read.
    number = context.replica_id_in_sync_group % local_replicas
    return tf.distribute.ReplicaContext(strategy, number)


_replaced_lock = threading.Lock()
_users = collections.Counter()
_originals = {}


@contextlib.contextmanager
def _replaced(owner, name, make):
    """Replace a function of TensorFlow by what `make` makes of it.

    Replicas trace in threads of their own, which may enter and leave in any order.
    """
    with _replaced_lock:
        if not _users[name]:
            _originals[name] = getattr(owner, name)
            setattr(owner, name, make(_originals[name]))
        _users[name] += 1
    try:
        yield
    finally:
        with _replaced_lock:
            _users[name] -= 1
            if not _users[name]:
                setattr(owner, name, _originals.pop(name))


@contextlib.contextmanager
def _twice_differentiable():
    """Replace what TensorFlow knows the first derivatives of alone, without saying so.

    The variance of `tf.nn.moments` hides its dependence on the mean. The derivative by the mean
    is zero, but second derivatives of batch, layer and group normalisation are wrong. Those of
    `tf.image.resize` are none or an error.
    """
    with _replaced(tf.nn, "moments", lambda _: _moments), _replaced(tf.image, "resize", _linear):
        yield


def _moments(x, axes, shift=None, keepdims=False, name=None):
    y = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
    mean = tf.reduce_mean(y, axes, keepdims=keepdims)
    return tf.cast(mean, x.dtype), tf.cast(tf.math.reduce_variance(y, axes, keepdims), x.dtype)


def _linear(function):
    """Return a function, linear in its first argument, with derivatives of all orders."""

    def linear(x, *args, **kwargs):
        @tf.custom_gradient
        def applied(x):
            return function(x, *args, **kwargs), transposed

        @tf.custom_gradient
        def transposed(upstream):
            with tf.GradientTape() as tape:
                zeros = tf.zeros_like(x)
                tape.watch(zeros)
                image = function(zeros, *args, **kwargs)
            return tape.gradient(image, zeros, upstream), applied

        return applied(x)

    return linear


def compiled(function):
    """Return a graph function."""

    def checked(*args):
        with draws_refused():
            return function(*args)

    return tf.function(checked, reduce_retracing=True, autograph=False)


def devices(model):
    """Return the devices of a `MirroredStrategy`."""
    strategy = model.distribute_strategy
    several = isinstance(strategy, tf.distribute.MirroredStrategy)
    return list(strategy.extended.worker_devices) if several else [None]


def on_device(device, function, *args):
    """Return what the function returns there."""
    if device is None:
        return function(*args)
    with tf.device(device):
        return function(*tf.nest.map_structure(tf.identity, args))


def after(array, other):
    """Return the array, once the other is known."""
    with tf.control_dependencies([other]):
        return tf.identity(array)


def is_traced(array):
    """Return whether the array stands for numbers that are not known yet."""
    return tf.is_symbolic_tensor(array)


def float64_allowed():
    """Do nothing: they always can."""
    return contextlib.nullcontext()


def jacobian(function, coupled, compiled=True):
    """Return `f(weights, context, *args) -> (values, rows)`."""

    def whole(weights, context, *args):
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(weights)
            with draws_refused():
                values = function(weights, context, *args)
        selectors = tf.eye(tf.shape(values)[0], dtype=values.dtype)
        rows = tf.map_fn(
            lambda selector: _gradients(tape, values, weights, selector),
            selectors,
            fn_output_signature=_specs(weights),
        )
        return values, rows

    def by_example(weights, context, *args):
        def one(example):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                example = tf.nest.map_structure(lambda a: a[None], example)
                with draws_refused():
                    value = function(weights, context, *example)[0]
            return value, _gradients(tape, value, weights)

        signature = tf.TensorSpec((), tf.float64), _specs(weights)
        return tf.map_fn(one, args, fn_output_signature=signature)

    rows_of = whole if coupled else by_example
    return tf.function(rows_of, reduce_retracing=True, autograph=False) if compiled else rows_of


def _gradients(tape, value, weights, selector=None):
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(value, weights, selector, unconnected_gradients=zero)
    return _dense(gradients, weights)


def _specs(weights):
    return [tf.TensorSpec(w.shape, w.dtype) for w in weights]


def main_pass(model, x, y, sample_weight):
    """Run Keras's forward and backward pass."""
    kwargs = {"training": True} if model._call_has_training_arg else {}
    with tf.GradientTape() as tape:
        y_pred = model(x, **kwargs)
        loss = model._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )
        # Under a strategy Keras divides the loss by the number of replicas.
        whole = loss * num_replicas(model)
        model._loss_tracker.update_state(whole, sample_weight=batch_size(x))
        loss = model.optimizer.scale_loss(loss)
    return y_pred, tape.gradient(loss, model.trainable_variables)


def forward(model, x, **kwargs):
    """Return the outputs."""
    return model(x, **kwargs)


def modules_at_variables(model):
    """Do nothing: all layers read variables."""
    return contextlib.nullcontext()


def without_rematerialization():
    """Let `tf.recompute_grad` return the function: its gradients see variables alone."""
    return _replaced(tf, "recompute_grad", lambda _: lambda function: function)


def functions_may_hide_weights():
    """Return `True`: `tf.recompute_grad` sees variables alone."""
    return True


def assigns_in_place():
    """Return `True`: there is one value of each variable at a time."""
    return True


def add(gradient, term):
    """Return gradient + term; the rows of a sparse gradient stay the same rows."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient + term
    # Rows may repeat (Keras's optimizers depend on how): each repeat takes an equal share.
    indices = tf.cast(gradient.indices, tf.int32)
    ones = tf.ones_like(indices, dtype=term.dtype)
    repeats = tf.gather(tf.math.unsorted_segment_sum(ones, indices, tf.shape(term)[0]), indices)
    share = tf.reshape(repeats, [-1] + [1] * (len(term.shape) - 1))
    values = gradient.values + tf.gather(term, indices) / share
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def apply(optimizer, gradients, variables):
    """Take the optimizer's step."""
    optimizer.apply_gradients(zip(gradients, variables))


def train_step(step, model, data):
    """Return the logs of the step."""
    data = keras.tree.map_structure(_as_tensor, data)
    if tf.executing_eagerly():
        check_draws_of_eager_model(model, keras.utils.unpack_x_y_sample_weight(data)[0])
    return step(data)


def _as_tensor(array):
    """Turn the NumPy arrays of `train_on_batch(run_eagerly=True)` into tensors."""
    composite = isinstance(array, tf.__internal__.CompositeTensor)
    return array if array is None or composite else tf.convert_to_tensor(array)


def passed_with_metrics(model, variables):
    """Return none: a compiled step reads and assigns any variable."""
    return []


def making_function(model, name):
    """Do nothing: each train function is compiled by itself, and variables keep their values."""
    return contextlib.nullcontext()


def marked_as_step(model, function):
    """Return the function."""
    return function


def batch_size(batch):
    """Return the number of examples, a Python integer where it is known while tracing."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    if first.shape[0] is not None:
        return int(first.shape[0])
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.cast(tf.shape(first)[0], tf.int32)


def slice_rows(array, start, length):
    """Return rows of a dense, ragged or sparse tensor."""
    if isinstance(array, tf.RaggedTensor):
        return array[start : start + length]
    if not isinstance(array, tf.SparseTensor):
        part = array[start : start + length]
        part.set_shape([length if isinstance(length, int) else None, *array.shape[1:]])
        return part
    shape = tf.cast(array.dense_shape, tf.int64)
    start, length = tf.cast(start, tf.int64), tf.cast(length, tf.int64)
    begin = tf.concat([[start], tf.zeros_like(shape[1:])], axis=0)
    part = tf.sparse.slice(array, begin, tf.concat([[length], shape[1:]], axis=0))
    static = [None, *array.shape[1:]]
    return tf.SparseTensor(
        part.indices, part.values, tf.ensure_shape(part.dense_shape, [len(static)])
    )


def random_state():
    """Return nothing: what TensorFlow's unseeded operations draw from cannot be read."""
    return []


def set_random_state(state):
    """Do nothing."""


def attach_state(model):
    """Do nothing: variables hold their values at all times."""


def widest_float():
    """Return `"float64"`."""
    return "float64"


def variables_of(model):
    """Return a context in which variables are made for the replicas of the model."""
    if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
        return contextlib.nullcontext()  # within a step no scope can be entered
    return model.distribute_strategy.scope()


def num_replicas(model):
    """Return the number of replicas of the model's `tf.distribute.Strategy`."""
    return model.distribute_strategy.num_replicas_in_sync


# Each replica runs the step on its own share of the batch.
num_parallel_steps = num_replicas


def mean_over_steps(array):
    """Return the mean over the replicas."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, array)


def over_replicas(function):
    """Return the function, which a step calls on its own share of the batch."""
    return function


def agree_on_overflow(optimizer):
    """Replace the check of the gradients, of which Keras takes the first replica's for all."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    check_finite = type(optimizer).check_finite

    def check_all_finite(gradients):
        finite = check_finite(optimizer, gradients)
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync == 1:
            return finite
        overflows = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
        return tf.equal(overflows, 0)

    optimizer.check_finite = check_all_finite


def own_batch(model, iterator):
    """Return what the first replica here gets of the first batch."""
    if model._distribute_strategy is None:
        return None
    local = model.distribute_strategy.experimental_local_results
    for _, _, batches in iterator:
        return keras.tree.map_structure(lambda a: local(a)[0], next(batches))


def reducible(model, step):
    """Give the logs an axis for several workers: Keras means them along their first."""
    if not _several_workers(model):
        return step
    return lambda data: keras.tree.map_structure(lambda a: tf.expand_dims(a, 0), step(data))


def _several_workers(model):
    strategy = model.distribute_strategy
    multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return multi_worker and strategy.extended._in_multi_worker_mode()


def is_chief(model):
    """Return whether this process writes checkpoints for its strategy."""
    return model.distribute_strategy.extended.should_checkpoint


def wait_for_workers(model):
    """Wait for the other workers of a `MultiWorkerMirroredStrategy`."""
    if _several_workers(model):
        model.distribute_strategy.reduce(tf.distribute.ReduceOp.SUM, tf.ones(()), axis=None)


def low_precision_products():
    """Return whether a GPU here computes float32 matrix products in TensorFloat-32."""
    if not tf.config.experimental.tensor_float_32_execution_enabled():
        return False
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return any(d.get("compute_capability", (0, 0)) >= (8, 0) for d in details)


def _dense(gradients, weights):
    """Return gradients as tensors of the weights' shapes, which tracing may have lost."""
    return [
        None if g is None else tf.ensure_shape(tf.convert_to_tensor(g), w.shape)
        for g, w in zip(gradients, weights)
    ]
