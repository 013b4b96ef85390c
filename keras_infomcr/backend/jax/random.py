"""JAX: random numbers."""

import jax


def random_state() -> list[jax.Array]:
    """Return nothing: JAX has no hidden random state."""
    return []


def set_random_state(state: list[jax.Array]) -> None:
    """Do nothing."""
