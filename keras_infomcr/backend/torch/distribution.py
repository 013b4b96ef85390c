"""torch: one device and one process, for Keras's `fit` on torch knows of no other."""

import contextlib
from collections.abc import Callable

import keras
import torch


def devices(model: keras.Model) -> list:
    """Return the one device, by the name of `None`."""
    return [None]


def on_device(device, function: Callable, *args):
    """Return what the function returns."""
    return function(*args)


def makes_variables_in_steps():
    """Return `True`: a step runs as it is written."""
    return True


def variables_of(model):
    """Do nothing: there is one replica."""
    return contextlib.nullcontext()


def num_replicas(model: keras.Model) -> int:
    """Return 1: there is one replica."""
    return 1


num_parallel_steps = num_replicas


def mean_over_steps(array: torch.Tensor) -> torch.Tensor:
    """Return the array: there is one step."""
    return array


def mean_over_replicas(arrays: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the arrays: there is one replica."""
    return arrays


def replica_index() -> int:
    """Return 0: there is one replica."""
    return 0


def over_replicas(function: Callable) -> Callable:
    """Return the function."""
    return function


def is_chief(model: keras.Model) -> bool:
    """Return `True`."""
    return True


def wait_for_workers(model: keras.Model) -> None:
    """Return at once."""
