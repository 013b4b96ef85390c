"""Functions of TensorFlow, JAX and torch for the tests, written independently of the package."""

import contextlib
import random

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()


def only_on(*backends, reason):
    """Skip a test on other backends; the reason is a full sentence."""
    return pytest.mark.skipif(BACKEND not in backends, reason=reason)


@contextlib.contextmanager
def float64_everywhere():
    """Let Keras compute in float64, which on JAX and torch it partly turns into float32."""
    from keras.src.backend.common import dtypes

    before = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    if BACKEND == "jax":
        jax.config.update("jax_enable_x64", False)
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = before


def slices(size, count):
    """Return the rows of each sub-batch of a batch."""
    count = min(size, count)
    return np.split(np.arange(size), [i * size // count for i in range(1, count)])


def array(values, dtype=None):
    """Return an array of the framework."""
    return keras.ops.convert_to_tensor(np.asarray(values, dtype))


def numpy(value):
    """Return a NumPy array of an array or variable of the framework."""
    return keras.ops.convert_to_numpy(value.value if isinstance(value, keras.Variable) else value)


def gradients(function, variables):
    """Evaluate a function of variables eagerly, and differentiate it; what it assigns is kept.

    Args:
        function: Function `() -> (value, auxiliary)`; the value may have any shape.
        variables: List of `keras.Variable`s, by which the sum of the value is differentiated.

    Returns:
        Tuple of the value, the auxiliary and the list of gradients, `None` where there is none.
    """
    return _GRADIENTS[BACKEND](function, variables)


def jacobian(function, variables):
    """Return the NumPy Jacobian `[n, W]` of `function() -> [n]` by `W` numbers in variables.

    What the function assigns is dropped.
    """
    with keras.StatelessScope():
        rows = _JACOBIANS[BACKEND](function, variables)
    return np.concatenate([np.reshape(numpy(r), (len(r), -1)) for r in rows], axis=1)


def _tensorflow_jacobian(function, variables):
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        values = function()
    return tape.jacobian(
        values,
        [v.value for v in variables],
        unconnected_gradients="zero",
        experimental_use_pfor=False,
    )


def _torch_jacobian(function, variables):
    import torch

    weights = [v.value for v in variables]
    values = function()
    rows = [
        torch.autograd.grad(
            v, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for v in values
    ]
    return [torch.stack(r) for r in zip(*rows)]


def _jax_jacobian(function, variables):
    import jax

    def pure(values):
        with keras.StatelessScope(zip(variables, values)):
            return function()

    return jax.jacrev(pure)([v.value for v in variables])


def _tensorflow(function, variables):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value, auxiliary = function()
    found = tape.gradient(value, [v.value for v in variables])
    return value, auxiliary, [None if g is None else tf.convert_to_tensor(g) for g in found]


def _torch(function, variables):
    import torch

    with torch.enable_grad():
        value, auxiliary = function()
        found = torch.autograd.grad(value.sum(), [v.value for v in variables], allow_unused=True)
    return value.detach(), auxiliary, list(found)


def _jax(function, variables):
    import jax

    scopes = []

    def pure(values):
        # The scope keeps all values that the function assigns.
        with keras.StatelessScope(zip(variables, values), collect_losses=True) as scope:
            assigned = _noting_assignments(scope)
            value, auxiliary = function()
        updates = [scope.get_current_value(v) for v in assigned]
        scopes.append(assigned)
        return keras.ops.sum(value), (value, auxiliary, updates)

    values = [v.value for v in variables]
    (_, (value, auxiliary, updates)), found = jax.value_and_grad(pure, has_aux=True)(values)
    for variable, update in zip(scopes[0], updates):
        variable.assign(update)
    return value, auxiliary, found


def _noting_assignments(scope):
    assigned, add_update = [], scope.add_update

    def add_and_note(update):
        if not any(v is update[0] for v in assigned):
            assigned.append(update[0])
        add_update(update)

    scope.add_update = add_and_note
    return assigned


_JACOBIANS = {
    "tensorflow": _tensorflow_jacobian,
    "jax": _jax_jacobian,
    "torch": _torch_jacobian,
}
_GRADIENTS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def stateful_step(model, step, *args):
    """Return what `train_step(*args)` must return, by an eager `step(data)` that assigns."""
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            return step(*args)
    if BACKEND != "jax":
        return step(*args)
    state, data = args
    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    for variables, values in zip(lists, state):
        for variable, value in zip(variables, values):
            variable.assign(value)
    logs = step(data)
    return logs, tuple([v.value for v in variables] for variables in lists)


def apply(optimizer, gradients, variables):
    """Take an optimizer's step, eagerly."""
    if BACKEND != "jax":
        optimizer.apply(gradients, variables)
        return
    state = [v.value for v in optimizer.variables]
    values = optimizer.stateless_apply(state, gradients, [v.value for v in variables])
    for variable, value in zip([*variables, *optimizer.variables], [*values[0], *values[1]]):
        variable.assign(value)


def global_random_number():
    """Draw from the framework's global generator; JAX has none."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return float(tf.random.uniform(()))
    if BACKEND == "torch":
        import torch

        return float(torch.rand(()))
    return None


def generator_states():
    """Return the states of the global generators that unseeded layers draw from."""
    states = [random.getstate()]
    if BACKEND == "torch":
        import torch

        states.append(torch.get_rng_state())
    return states


def restore_generators(states):
    """Set what `generator_states` returned."""
    random.setstate(states[0])
    if BACKEND == "torch":
        import torch

        torch.set_rng_state(states[1])


def assert_array_equal(actual, desired, **kwargs):
    """Compare arrays of the framework, or of NumPy, to the bit."""
    np.testing.assert_array_equal(numpy(actual), numpy(desired), **kwargs)


def assert_allclose(actual, desired, **kwargs):
    """Compare arrays of the framework, or of NumPy, within a tolerance."""
    np.testing.assert_allclose(numpy(actual), numpy(desired), **kwargs)


def tensorflow():
    """Return TensorFlow, for its data sets, which Keras takes on every backend."""
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
