"""JAX: devices, replicas and processes of a `keras.distribution`."""

import contextlib
import functools
from collections.abc import Callable

import jax
import keras
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask


def devices(model: keras.Model) -> list:
    """Return the devices of this process in a `keras.distribution.DataParallel`."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        return [None]
    mesh = distribution.device_mesh.backend_mesh
    return list(mesh.local_devices)


def on_device(device, function: Callable, *args):
    """Return what the function returns there."""
    if device is None:
        return function(*args)
    return function(*jax.device_put(jax.tree.map(_local, args), device))


def _local(array):
    """Return what this process holds of an array that all processes hold whole."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if whole else array.addressable_data(0)


def makes_variables_in_steps():
    """Return `True`: Keras has built every model before a step."""
    return True


def variables_of(model):
    """Do nothing: Keras lays variables out by `keras.distribution`."""
    return contextlib.nullcontext()


def num_replicas(model: keras.Model | None) -> int:
    """Return the number of shares into which `keras.distribution` cuts a batch."""
    mesh, axis = _batch_axis()
    return mesh.shape[axis] if mesh else 1


def num_parallel_steps(model: keras.Model) -> int:
    """Return 1: a step sees the whole batch, on however many devices it lies."""
    return 1


def _batch_axis():
    """Return the mesh of devices and the name of its axis that batches are cut along."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None, None
    return distribution.device_mesh.backend_mesh, distribution.batch_dim_name


def mean_over_steps(array: jax.Array) -> jax.Array:
    """Return the array: there is one step."""
    return array


def mean_over_replicas(arrays: list[jax.Array]) -> list[jax.Array]:
    """Return the means over the replicas that `over_replicas` maps over."""
    return jax.lax.pmean(arrays, _batch_axis()[1]) if num_replicas(None) > 1 else arrays


def replica_index() -> int | jax.Array:
    """Return the number of the replica that `over_replicas` maps over."""
    return jax.lax.axis_index(_batch_axis()[1]) if num_replicas(None) > 1 else 0


def over_replicas(function: Callable) -> Callable:
    """Return the function, mapped over the shares of the batch where they lie.

    Left to itself XLA would cut each slice of the batch anew over all devices, and sum each of
    its gradients over them.
    """
    if num_replicas(None) == 1:
        return function
    mesh, axis = _batch_axis()

    def on_replica(batch):
        means, predictions = function(batch)
        # Masks are attributes of arrays, which a mapped function does not pass on.
        masks = [get_keras_mask(p) for p in keras.tree.flatten(predictions)]
        return jax.tree.map(mean, means), (predictions, masks)

    def mean(array):
        # Integers are seeds and counters, which are the same on all replicas.
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


def is_chief(model: keras.Model) -> bool:
    """Return whether this is the first process of a `keras.distribution`."""
    return keras.distribution.distribution() is None or jax.process_index() == 0


def wait_for_workers(model: keras.Model) -> None:
    """Wait for all processes of a `keras.distribution`."""
    if keras.distribution.distribution() is not None and jax.process_count() > 1:
        multihost_utils.sync_global_devices("keras_infomcr")


def without_distribution(function: Callable) -> Callable:
    """Hide the `keras.distribution` of replicas, whose layers must not lay out their outputs.

    Within `over_replicas` a layer sees the share of one replica, which lies on one device.
    """

    @functools.wraps(function)
    def hidden(*args):
        distribution = keras.distribution.distribution()
        if num_replicas(None) == 1:
            return function(*args)
        keras.distribution.set_distribution(None)
        try:
            return function(*args)
        finally:
            keras.distribution.set_distribution(distribution)

    return hidden
