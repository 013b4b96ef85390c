"""The parts of `on_gpu.py` that are neither steps nor gamma-hat: functions that yield rows."""

import gamma_hat
import keras
import models
import numpy as np
import step_cost
from machine import BACKEND, is_gpu, set_precision
from timing import in_turn, median_ratios, median_seconds, seconds_of

from keras_infomcr import RegularizedModel, flatness
from keras_infomcr.regularizers import SubBatchPerturbation


def agreement(quick):
    """Yield how far the numbers of this device are from the CPU's."""
    with keras.device("cpu"):
        exact = _numbers(quick)
    for precision in ["float32"] if quick else ["float32", "tf32"]:
        set_precision(precision)
        with keras.device("gpu" if is_gpu() else "cpu"):
            found = _numbers(quick)
        for name, value in exact.items():
            error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
            yield row_of(
                "agreement with the CPU", f"{name}, {precision}", "relative difference", error
            )


def _numbers(quick):
    """Return what a small model computes: arrays by name."""
    x, y = models.random_data(_small(), 64)
    infomcr = SubBatchPerturbation(1e-3, 100.0, 2, main_gradient="full_batch")
    plain, _ = _step(_small(), x, y)
    regularised, logs = _step(_small(RegularizedModel, regularizer=infomcr), x, y)
    settings = {"num_examples": 16 if quick else 64, "num_trials": 1, "seed": 0}
    return {
        "loss": np.array(logs["loss"]),
        "gradient": plain,
        "value of the regulariser": np.array(logs["infomcr_reg"]),
        "gradient of the regulariser": regularised - plain,
        "gamma-hat": np.array([flatness.gamma_hat(_small(), x, y, **settings).value]),
    }


def _step(model, x, y):
    """Return the gradient that a step follows, and the logs."""
    logs = model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0).history
    # After one step at a learning rate of 1 the momenta are minus the gradients, to all digits.
    momenta = model.optimizer.variables[-len(model.trainable_variables) :]
    return np.concatenate([_numpy(v).ravel() for v in momenta]), logs


def _small(base=keras.Model, **compile_options):
    """Return a small network of a smooth activation, with weights that NumPy has drawn."""
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(16, 3, use_bias=False)(inputs)
    x = keras.layers.Activation("gelu")(keras.layers.BatchNormalization()(x))
    x = keras.layers.LayerNormalization()(keras.layers.Conv2D(32, 3, 2)(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("gelu")(x))
    model = base(inputs, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0, momentum=0.9), loss, **compile_options)
    draw = np.random.default_rng(1)
    for variable in model.trainable_variables:
        around = 1.0 if "gamma" in variable.path else 0.0
        variable.assign(around + 0.2 * draw.normal(size=variable.shape))
    return model


def paired_differences(quick):
    """Yield what g(w) - g(w - alpha g) takes in float32 and in TensorFloat-32, and how it differs.

    The package computes both gradients in true float32. This is the framework's own gradient.
    """
    network, batch_size = ("mlp", 32) if quick else ("resnet-20", 512)
    model = models.make(network)
    x, y = map(keras.ops.convert_to_tensor, models.random_data(model, batch_size))
    weights = [v.value for v in model.trainable_variables]
    found, calls = {}, {}
    for precision in ("float32", "tf32"):
        pair = _pair(model)

        def call(precision=precision, pair=pair):
            set_precision(precision)
            found[precision] = np.concatenate([_numpy(d).ravel() for d in pair(weights, x, y)])

        calls[precision] = call
        call()
    times = in_turn(calls, rounds=3, at_least=0.0 if quick else 2.0)
    what = f"{network}, batch {batch_size}, alpha {step_cost.ALPHA:g}"
    name = "paired differences"
    for precision, seconds in median_seconds(times).items():
        yield row_of(name, f"{what}, {precision}", "seconds", seconds)
    ratio = median_ratios(times, "float32")["tf32"]
    yield row_of(name, f"{what}, tf32", "times float32", ratio)
    error = np.linalg.norm(found["tf32"] - found["float32"]) / np.linalg.norm(found["float32"])
    yield row_of(name, f"{what}, tf32", "relative difference", error)


def _pair(model):
    state = [v.value for v in model.non_trainable_variables]

    def loss(weights, x, y):
        return model.loss(y, model.stateless_call(weights, state, x, training=True)[0])

    gradient = _gradient(loss)

    def pair(weights, x, y):
        g = gradient(weights, x, y)
        h = gradient([w - step_cost.ALPHA * d for w, d in zip(weights, g)], x, y)
        return [a - b for a, b in zip(g, h)]

    if BACKEND == "jax":
        import jax

        return jax.jit(pair)
    return pair


def _gradient(loss):
    if BACKEND == "jax":
        import jax

        return jax.grad(loss)
    import torch

    def gradient(weights, x, y):
        leaves = [w.detach().requires_grad_() for w in weights]
        return torch.autograd.grad(loss(leaves, x, y), leaves)

    return gradient


def lanczos(quick):
    """Yield what the largest eigenvalue of the Hessian takes, in the first call and the second."""
    network, count = ("small", 16) if quick else ("resnet-20", 128)
    if quick:
        model = _small()
        x, y = models.random_data(model, count)
    else:
        model, x, y = gamma_hat.make(network, count)
    found = {}

    def call():
        found["value"] = flatness.hessian_top_eigenvalues(
            model, x[:count], y[:count], num_eigenvalues=1, tolerance=0.1, max_products=20, seed=0
        ).value

    what = f"{network}, {count} examples"
    yield row_of("Lanczos", f"{what}, first call", "seconds", seconds_of(call))
    yield row_of("Lanczos", f"{what}, second call", "seconds", seconds_of(call))
    yield row_of("Lanczos", what, "largest eigenvalue", found["value"])


PARTS = {
    "agreement with the CPU": agreement,
    "paired differences": paired_differences,
    "Lanczos": lanczos,
}


def _numpy(array):
    return np.asarray(keras.ops.convert_to_numpy(array), "float64")


def row_of(part, what, unit, value):
    """Return a row of the report of what is neither a step nor gamma-hat."""
    return {"part": part, "what": what, "unit": unit, "value": float(value)}


def same(row, other):
    """Return whether two rows are of the same thing."""
    return row | {"value": 0} == other | {"value": 0}


def table(report):
    """Return the rows of a report as a table in Markdown."""
    lines = [f"{report['versions']}:", "", "| part | | | value |", "|---|---|---|---:|"]
    for r in report["rows"]:
        lines.append(f"| {r['part']} | {r['what']} | {r['unit']} | {r['value']:.3g} |")
    return "\n".join([*lines, ""])
