"""JAX: differentiation of functions of weights, and the training step.

Private names of Keras used here, unchanged from 3.10 to 3.15, because Keras's own `train_step`
uses them too: `_loss_tracker`, `in_stateless_scope`; and the functions for masks.
"""

import contextlib
import functools

import jax
import keras
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope


def _in_true_float32(function):
    """Let an NVIDIA GPU compute float32 matrix products in float32, not in TensorFloat-32."""

    @functools.wraps(function)
    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return precise


def _alone(function):
    """Hide the `keras.distribution` of replicas, whose layers must not lay out their outputs."""

    @functools.wraps(function)
    def alone(*args):
        distribution = keras.distribution.distribution()
        if num_replicas(None) == 1:
            return function(*args)
        keras.distribution.set_distribution(None)
        try:
            return function(*args)
        finally:
            keras.distribution.set_distribution(distribution)

    return alone


def value_and_grad(function):
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""
    return _alone(_in_true_float32(jax.value_and_grad(function, has_aux=True)))


def hessian_vector_product(function):
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""

    def gradient_and_value(weights, *args):
        value, gradients = jax.value_and_grad(function, has_aux=True)(weights, *args)
        return gradients, value

    @_alone
    @_in_true_float32
    def product(weights, vector, *args):
        gradients, product_with, value = jax.linearize(
            lambda w: gradient_and_value(w, *args), weights, has_aux=True
        )
        return value, gradients, product_with(vector or gradients)

    return product


def hessian_vector_products(function, compiled=True):
    """Return `f(weights, vectors, *args) -> products`."""
    jit = jax.jit if compiled else lambda f: f

    @jit
    @_alone
    @_in_true_float32
    def linearize(weights, *args):
        return jax.linearize(lambda w: jax.grad(function)(w, *args), weights)[1]

    @jit  # at the precision that was linearised at
    def product(linear, vectors, k):
        return linear([v[k] for v in vectors])

    def products(weights, vectors, *args):
        linear = linearize(weights, *args)
        # Not in a compiled loop: there XLA's convolutions are slow on CPUs.
        found = [product(linear, vectors, k) for k in range(len(vectors[0]))]
        return [jax.numpy.stack(p) for p in zip(*found)]

    return products


def compiled(function):
    """Return the function, compiled by XLA."""
    return jax.jit(function)


def devices(model):
    """Return the devices of this process in a `keras.distribution.DataParallel`."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        return [None]
    mesh = distribution.device_mesh.backend_mesh
    return list(mesh.local_devices)


def on_device(device, function, *args):
    """Return what the function returns there."""
    if device is None:
        return function(*args)
    return function(*jax.device_put(jax.tree.map(_local, args), device))


def _local(array):
    """Return what this process holds of an array that all processes hold whole."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if whole else array.addressable_data(0)


def after(array, other):
    """Return the array: XLA puts operations in an order that saves memory."""
    return array


def is_traced(array):
    """Return whether the array stands for numbers that are not known yet."""
    return isinstance(array, jax.core.Tracer)


def float64_allowed():
    """Return a context in which float64 is no longer float32."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()  # where it was before


def jacobian(function, coupled, compiled=True):
    """Return `f(weights, context, *args) -> (values, rows)`."""
    jit = jax.jit if compiled else lambda f: f

    @jit
    @_in_true_float32
    def linearize(weights, context, *args):
        return jax.vjp(lambda w: function(w, context, *args), weights)

    @jit  # at the precision that the pullback was made with
    def pull_back(pullback, selector):
        return pullback(selector)[0]

    def whole(weights, context, *args):
        values, pullback = linearize(weights, context, *args)
        # Not in a compiled loop: there XLA's convolutions are slow on CPUs.
        rows = [pull_back(pullback, one) for one in jax.numpy.eye(len(values), dtype=values.dtype)]
        return values, [jax.numpy.stack(r) for r in zip(*rows)]

    @jit
    @_in_true_float32
    def by_example(weights, context, *args):
        def one(weights, example):
            example = jax.tree.map(lambda a: a[None], example)
            return function(weights, context, *example)[0]

        return jax.vmap(jax.value_and_grad(one), in_axes=(None, 0))(weights, args)

    return whole if coupled else by_example


def traced_once(function):
    """Return the function."""
    return function


def looped(accumulate, compiled):
    """Return `accumulate`."""
    return accumulate


def cond(predicate, true_function, false_function):
    """Call one of two functions."""
    return jax.lax.cond(predicate, true_function, false_function)


def main_pass(model, x, y, sample_weight):
    """Run Keras's forward and backward pass."""
    state, metrics = model.non_trainable_variables, model.metrics_variables
    gradient = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)
    (_, (loss, y_pred, *updates)), gradients = gradient(
        *(_values(v) for v in (model.trainable_variables, state, metrics)),
        x,
        y,
        sample_weight,
        training=True,
        optimizer_variables=_values(model.optimizer.variables),
    )
    for variables, values in zip((state, metrics), updates):
        _assign(variables, values)
    model._loss_tracker.update_state(loss, sample_weight=batch_size(x))
    return y_pred, gradients


def _values(variables):
    return [v.value for v in variables]


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)


def forward(model, x, **kwargs):
    """Return the outputs of the model's `call`, which Keras calls directly."""
    return model.call(x, **kwargs)


def modules_at_variables(model):
    """Do nothing: all layers read variables."""
    return contextlib.nullcontext()


def without_rematerialization():
    """Do nothing: `jax.checkpoint` computes anew from what it has seen."""
    return contextlib.nullcontext()


def functions_may_hide_weights():
    """Return `False`: `jax.checkpoint` sees all arrays."""
    return False


def assigns_in_place():
    """Return `False`: Keras's step is a function that returns what has been assigned."""
    return False


def add(gradient, term):
    """Return gradient + term."""
    return gradient + term


def apply(optimizer, gradients, variables):
    """Take the optimizer's step."""
    # Not `optimizer.apply`, which a `LossScaleOptimizer` has for stateful backends alone.
    values, state = optimizer.stateless_apply(
        _values(optimizer.variables), gradients, _values(variables)
    )
    _assign([*variables, *optimizer.variables], [*values, *state])


def train_step(step, model, state, data):
    """Return the logs and the new state: of Keras's four lists of variables, in its order."""
    lists, (ours, present) = _lists(model), _hidden(model)
    mapping = [pair for variables, values in zip(lists, state) for pair in zip(variables, values)]
    with keras.StatelessScope(state_mapping=[*mapping, *zip(ours, present)]) as scope:
        logs = step(data)
    present[:] = [scope.get_current_value(v) for v in ours]
    return logs, tuple([scope.get_current_value(v) for v in variables] for variables in lists)


def passed_with_metrics(model, variables):
    """Return all, or none in a step, which gets them unseen: see `_hiding`."""
    return [] if _hidden(model)[0] else variables


@contextlib.contextmanager
def making_function(model, name):
    """Have the step get our variables, be compiled apart from others, and keep the state."""
    step, function = f"{name}_step", f"{name}_function"
    own, before = model.__dict__.get(step), getattr(model, function)
    object.__setattr__(model, step, _hiding(model, getattr(model, step)))
    try:
        yield
    finally:
        object.__delattr__(model, step)
        if own is not None:
            object.__setattr__(model, step, own)
    if getattr(model, function) is not before:
        made = marked_as_step(model, getattr(model, function))
        setattr(model, function, _keeping_state(model, made) if name == "train" else made)


def _hiding(model, step):
    """Return a step that passes what the regulariser reads and assigns, unseen by a user's step.

    A compiled step knows only the variables in its state, and a user's own step counts those of
    the metrics. So ours stand behind these in the state, and are taken off before the user's step.
    JAX compiles equal functions once: this one is equal to no other.
    """

    def hiding(state, data):
        *lists, metrics = state
        ours = model._variables_in_step()
        count = len(metrics) - len(ours)
        values = metrics[count:]
        object.__setattr__(model, "_hidden_in_step", (ours, values))
        try:
            logs, (*lists, seen) = step((*lists, metrics[:count]), data)
        finally:
            object.__setattr__(model, "_hidden_in_step", ([], []))
        return logs, (*lists, [*seen, *metrics[len(seen) : count], *values])

    return hiding


def _hidden(model):
    """Return the variables that the present step gets unseen, and their present values."""
    return model.__dict__.get("_hidden_in_step", ([], []))


def _keeping_state(model, step):
    """Give the variables back the values that `fit` has taken from them, should a step fail."""

    def function(state, iterator):
        try:
            return step(state, iterator)
        except StopIteration:
            raise
        except BaseException:
            for variables, values in zip(_lists(model), state):
                for variable, value in zip(variables, values):
                    if not value.is_deleted():
                        variable.assign(value)
            raise

    return function


def marked_as_step(model, function):
    """Return the function, which has what it needs: `attach_state` does nothing within it."""

    def marked(*args):
        object.__setattr__(model, "_in_step", True)
        try:
            return function(*args)
        finally:
            object.__setattr__(model, "_in_step", False)

    return marked


def _lists(model):
    """Return the lists of variables that make Keras's state, in its order."""
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )


def batch_size(batch):
    """Return the number of examples."""
    return next(a for a in keras.tree.flatten(batch) if a is not None).shape[0]


def slice_rows(array, start, length):
    """Return rows of a dense or sparse array."""
    return array[start : start + length]


def random_state():
    """Return nothing: JAX has no hidden random state."""
    return []


def set_random_state(state):
    """Do nothing."""


def attach_state(model):
    """Give the variables the values that `fit` holds, and let it read them again."""
    # A step itself has what it needs, and must not be taken for synchronised.
    if not (getattr(model, "_in_step", False) or in_stateless_scope()):
        model.jax_state_sync()


def widest_float():
    """Return `"float64"` where `jax_enable_x64` is set, else `"float32"`."""
    return "float64" if jax.config.jax_enable_x64 else "float32"


def variables_of(model):
    """Do nothing: Keras lays variables out by `keras.distribution`."""
    return contextlib.nullcontext()


def num_replicas(model):
    """Return the number of shares into which `keras.distribution` cuts a batch."""
    mesh, axis = _batch_axis()
    return mesh.shape[axis] if mesh else 1


def num_parallel_steps(model):
    """Return 1: a step sees the whole batch, on however many devices it lies."""
    return 1


def _batch_axis():
    """Return the mesh of devices and the name of its axis that batches are cut along."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None, None
    return distribution.device_mesh.backend_mesh, distribution.batch_dim_name


def mean_over_steps(array):
    """Return the array."""
    return array


def over_replicas(function):
    """Return the function, mapped over the shares of the batch where they lie.

    Left to itself XLA would cut each slice of the batch anew over all devices, and sum each of
    its gradients over them.
    """
    if num_replicas(None) == 1:
        return function
    mesh, axis = _batch_axis()

    def on_replica(batch):
        means, predictions = function(batch)
        masks = [get_keras_mask(p) for p in keras.tree.flatten(predictions)]
        return jax.tree.map(mean, means), (predictions, masks)

    def mean(array):
        floating = jax.numpy.issubdtype(jax.numpy.result_type(array), jax.numpy.floating)
        return jax.lax.pmean(array, axis) if floating else array

    # Compiled, for outside of a program JAX cannot map along one axis of several.
    mapped = jax.jit(
        jax.shard_map(
            on_replica,
            mesh=mesh,
            in_specs=PartitionSpec(axis),
            out_specs=(PartitionSpec(), PartitionSpec(axis)),
            axis_names={axis},
            check_vma=False,  # else gradients would be summed over replicas where they are taken
        )
    )

    def joined(batch):
        means, (predictions, masks) = mapped(batch)
        for prediction, mask in zip(keras.tree.flatten(predictions), masks):
            if mask is not None:
                set_keras_mask(prediction, mask)
        return means, predictions

    return joined


def agree_on_overflow(optimizer):
    """Do nothing: gradients are summed before the optimizer sees them."""


def own_batch(model, iterator):
    """Return `None`: Keras builds the model from any batch."""


def reducible(model, step):
    """Return the step."""
    return step


def is_chief(model):
    """Return whether this is the first process of a `keras.distribution`."""
    return keras.distribution.distribution() is None or jax.process_index() == 0


def wait_for_workers(model):
    """Wait for all processes of a `keras.distribution`."""
    if keras.distribution.distribution() is not None and jax.process_count() > 1:
        multihost_utils.sync_global_devices("keras_infomcr")


def low_precision_products():
    """Return `False`: the precision is asked for operation by operation."""
    return False
