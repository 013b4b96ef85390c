"""How replicas share the sub-batches of a batch."""

import warnings

import keras

from keras_infomcr import backend


def share_of_replica(count: int, model: keras.Model) -> int:
    """Return how many of `count` sub-batches fall to one replica."""
    return max(1, count // backend.num_replicas(model))


def warn_of_uneven_shares(model: keras.Model, stacklevel: int, **counts: int | None):
    """Warn of numbers of sub-batches that the replicas cannot share evenly."""
    replicas = backend.num_replicas(model)
    for name, asked in counts.items():
        if asked is not None and asked % replicas:
            each = share_of_replica(asked, model)
            warnings.warn(
                f"`{name}={asked}` is not divisible by {replicas} replicas: each uses {each}, "
                f"{each * replicas} in total. Use a multiple of {replicas}.",
                stacklevel=stacklevel + 1,
            )
