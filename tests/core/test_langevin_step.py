"""The Langevin chain of quadratic losses a u^2 / 2, whose moments have a closed form."""

import numpy as np
import pytest

from keras_infomcr.core.langevin_step import langevin_step

SETTINGS = {"step_size": 0.2, "gamma": 0.7, "noise": 0.3}


@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_stationary_variance(curvature, rng):
    """The variance of 200,000 chains after 60 steps, which forget the start to 0.76^120 < 1e-14.

    It is known to sqrt(2 / 200,000) = 0.3 %; five of these are allowed. That of continuous time,
    noise^2 / (2 (a + gamma)), is 12 % less or more, and that of the codes' noise is twice as large.
    """
    u = velocities = np.zeros(200_000)
    for _ in range(60):
        noise = rng.normal(size=u.size)
        (u,), _ = langevin_step([u], [velocities], [curvature * u], [noise], momentum=0, **SETTINGS)
    c = curvature + 0.7
    assert u.var() == pytest.approx(0.3**2 / (c * (2 - 0.2 * c)), rel=0.016)


def test_momentum_is_that_of_the_gradient_alone(rng):
    """Steps are linear in what drives them: each driver by itself, read from the docstring."""
    u, v, g, z = rng.normal(size=(4, 3))
    (moved,), (velocity,) = langevin_step([u], [v], [g], [z], momentum=0.9, **SETTINGS)
    np.testing.assert_allclose(velocity, 0.9 * v + g, rtol=1e-15)
    expected = u - 0.2 * (1.9 * g + 0.81 * v) - 0.2 * 0.7 * u + np.sqrt(0.2) * 0.3 * z
    np.testing.assert_allclose(moved, expected, rtol=1e-13)


def test_weights_without_a_gradient_stay(rng):
    u, z = rng.normal(size=(2, 3))
    (moved,), _ = langevin_step([u], [u], [None], [z], momentum=0.9, **SETTINGS)
    np.testing.assert_array_equal(moved, u)
