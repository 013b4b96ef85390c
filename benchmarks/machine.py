"""What the benchmarks ask of the machine that they run on."""

import ctypes
import gc
import os
import pathlib
import platform
import re
import tracemalloc

import keras
from timing import seconds_of

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
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
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


def first_call(function):
    """Call a function for the first time.

    Returns:
        Tuple of the seconds that it takes, and of the MiB that `peak_memory` needs to know on JAX,
        where no count tells what a program takes: the temporary memory of the largest of those
        that were compiled. `None` elsewhere.
    """
    if BACKEND != "jax":
        return seconds_of(function), None
    import jax

    client = jax.devices()[0].client
    before = client.live_executables()  # held, so that no other gets their places
    seconds = seconds_of(function)
    programs = set(client.live_executables()) - set(before)
    try:
        found = [p.get_compiled_memory_stats().temp_size_in_bytes for p in programs]
    except RuntimeError:  # a device whose compiler does not tell
        return seconds, None
    return seconds, max(found, default=0) / 2**20


def peak_memory(function, of_programs=None):
    """Return what a call takes beyond what was held before, in MiB.

    On TensorFlow, and with torch on GPUs, by the framework's own count; on JAX by what its first
    call has compiled; to which NumPy's count is added. With torch on CPUs by what Linux counts for
    the process. `None` where nothing counts.

    Args:
        function: Function without arguments, which has been called before.
        of_programs: Float, what `first_call` has found, or `None`.
    """
    if BACKEND == "torch" and not is_gpu():
        return _peak_of_process(function)
    tracemalloc.start()
    try:
        of_framework = _peak_of_framework(function, of_programs)
        of_numpy = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    return None if of_framework is None else of_framework + of_numpy


def _peak_of_process(function):
    """Return how far the memory of the process rises, once it has handed back what is free."""
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the highest mark becomes the present level
    before = _kib(status, "VmRSS")
    function()
    return (_kib(status, "VmHWM") - before) / 2**10


def _kib(status, name):
    return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1])


def _peak_of_framework(function, of_programs):
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
    function()
    return of_programs
