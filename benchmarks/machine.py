"""What the benchmarks ask of the machine that they run on."""

import os
import platform
import tracemalloc

import keras

BACKEND = keras.backend.backend()


def device():
    """Return the name of the GPU in use, or the number and kind of CPU cores."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        names = [tf.config.experimental.get_device_details(g)["device_name"] for g in gpus]
    elif BACKEND == "jax":
        import jax

        names = [d.device_kind for d in jax.devices() if d.platform == "gpu"]
    else:
        import torch

        names = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return names[0] if names else f"{os.cpu_count()} CPU cores, {platform.machine()}"


def is_gpu():
    """Return whether the device is a GPU."""
    return "CPU" not in device()


def set_precision(precision):
    """Set what float32 matrix products and convolutions round like, or the dtype policy.

    Args:
        precision: `"float32"`, `"tf32"` or `"bfloat16"`, the last by Keras's mixed precision.
    """
    if precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    reduced = precision == "tf32"
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(reduced)
    elif BACKEND == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if reduced else "highest")
    else:
        import torch

        for operation in torch.backends.cuda.matmul, torch.backends.cudnn.conv:
            operation.fp32_precision = "tf32" if reduced else "ieee"


def peak_memory(function):
    """Return what a call takes beyond what was held before, in MiB.

    By the framework's own count (TensorFlow counts, and torch on GPUs; else `None`) and NumPy's,
    at their peaks.
    """
    tracemalloc.start()
    try:
        of_framework = _peak_of_framework(function)
        of_numpy = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    return None if of_framework is None else of_framework + of_numpy


def _peak_of_framework(function):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        name = "GPU:0" if is_gpu() else "CPU:0"
        try:
            tf.config.experimental.reset_memory_stats(name)
        except ValueError:  # an allocator that does not count
            return None
        function()
        info = tf.config.experimental.get_memory_info(name)
        return (info["peak"] - info["current"]) / 2**20
    if BACKEND == "torch" and is_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return None
