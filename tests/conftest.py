import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

# Keras and the framework are imported where they are used: pytest reads this file also in the
# process that only hands out the tests, and the others start when that has read it.


def pytest_collection():
    """Set up the devices, before the first test is imported, in each process that runs tests."""
    from frameworks import BACKEND

    if BACKEND == "tensorflow":
        import tensorflow as tf

        # Two logical devices stand in for GPUs under `MirroredStrategy`.
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", 4)
    if BACKEND == "torch":
        import torch

        # With more the threads of two processes wait for each other.
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_keras():
    import keras

    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def float64():
    from frameworks import float64_everywhere

    with float64_everywhere():
        yield


@pytest.fixture(scope="session")
def digits():
    """Return scikit-learn's digits, pixels from 0 to 1: `[1797, 64]` float32, `[1797]` integers."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y.astype("int32")


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def mirrored():
    """Return the one strategy: a second one in the same process fails in TensorFlow."""
    from frameworks import BACKEND

    if BACKEND != "tensorflow":
        pytest.skip("`tf.distribute` is a part of TensorFlow.")
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
