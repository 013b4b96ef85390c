"""What the tests of the backend share."""

import pytest
from frameworks import BACKEND


@pytest.fixture
def fast_compilation():
    """Let XLA spend less time on programs that run once."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
