"""What the benchmarks ask of the machine that they run on."""

import os
import platform

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
    """Return what a call takes beyond what was held before, in MiB, by the framework's own count.

    TensorFlow counts, and torch on GPUs; else `None`.
    """
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


def peak_resident_memory(function):
    """Return what a call takes beyond what the process held before, in MiB.

    On a GPU by the framework's count, as `peak_memory`; else by Linux's, `None` elsewhere. It sees
    the memory of all libraries, and none that an allocator kept from earlier calls.
    """
    if is_gpu():
        return peak_memory(function)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def _status(name):
    """Return an entry of Linux's record of this process, in KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
