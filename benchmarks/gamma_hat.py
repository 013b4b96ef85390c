"""Time gamma-hat against plain forward and backward passes, side by side in one process.

For each network and number N' of examples, one trial of gamma-hat is measured, beside the gradient
of the mean loss of the same examples in the same mode and, on TensorFlow, a literal transcription
of the paper's Eq. 5: the Jacobian of the losses in chunks of 10, and its singular values.

    python benchmarks/gamma_hat.py --quick
    python benchmarks/gamma_hat.py --networks wrn-28-2 --num-examples 100

prints the table and adds it, as JSON and as a figure of the networks measured at several N', to
those in benchmarks/results/ that were measured with the same versions on the same kind of machine,
from which `performance.py` makes the tables of docs/performance.md. KERAS_BACKEND chooses the
backend. On TensorFlow, `--replicas 2` compares trials on two logical CPU devices with one.
"""

import functools
import itertools

import keras
import matplotlib
import models
import numpy as np
import report as reports
from machine import BACKEND, first_call, peak_memory, set_precision
from timing import in_turn, median_ratios, median_seconds, seconds_of

from keras_infomcr import backend
from keras_infomcr.flatness.fisher.gamma_hat import GammaHat
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.objective import Objective

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def make(name, count=200):
    """Return a compiled model of initial weights, and random data: 200 examples, or more.

    The moving statistics of its batch normalisation are the data's, as after training: with the
    initial ones the activations of deep networks would grow from layer to layer.
    """
    model = models.make(name)
    x, y = models.random_data(model, max(200, count))
    for layer in models.batch_norms(model):
        layer.momentum = 0.0
    model(x[:50], training=True)
    return model, x, y


def plain(model, x, y):
    """Return a function that computes the gradient of the mean loss, in inference mode."""
    objective = Objective(model)

    def loss(weights, state, x, y):
        with objective.at(weights, state, training=False) as (predict, _):
            return model.loss(y, predict(x)), ()

    gradient = backend.compiled(backend.value_and_grad(loss))

    def run():
        (value, _), _ = gradient(objective.weights(), objective.state(), x, y)
        return float(keras.ops.convert_to_numpy(value))

    return run


def trial_settings(num_examples, num_trials):
    """Return the settings of `gamma_hat`, its own defaults for all others."""
    return TrialSettings(
        num_examples=num_examples,
        num_trials=num_trials,
        training=False,
        chunk_size=None,
        normalize_softmax=False,
        softmax_scale=0.04,
        seed=0,
    )


def ours(model, x, y):
    """Return a function that measures gamma-hat."""
    settings = trial_settings(num_examples=len(x), num_trials=1)
    estimator = GammaHatEstimator(model, x, y, settings)
    return lambda: GammaHat.of_parts(estimator.measure()).value


class Literal:
    """Computes the Jacobian of the losses, in chunks of 10, and its singular values."""

    def __init__(self, model):
        import tensorflow as tf

        @tf.function
        def jacobian(x, y):
            with tf.GradientTape() as tape:
                losses = keras.ops.sparse_categorical_crossentropy(y, model(x), from_logits=True)
            return tape.jacobian(losses, model.trainable_variables)

        self.jacobian = jacobian

    def __call__(self, x, y):
        rows = []
        for i in range(0, len(x), 10):
            parts = self.jacobian(*map(keras.ops.convert_to_tensor, (x[i : i + 10], y[i : i + 10])))
            rows.append(np.concatenate([p.numpy().reshape(len(p), -1) for p in parts], axis=1))
        rows = np.concatenate(rows).astype("float64")
        return 2 * np.sum(np.log(np.linalg.svd(rows, compute_uv=False)))


def measure(name, count, rounds, with_literal):
    """Return the rows of one network and N'."""
    model, x, y = make(name, count)
    x, y = x[:count], y[:count]
    values = {}

    def keep(label, function):
        values[label] = function()

    functions = {
        "plain": functools.partial(keep, "plain", plain(model, x, y)),
        "gamma-hat": functools.partial(keep, "gamma-hat", ours(model, x, y)),
    }
    first = {label: first_call(function) for label, function in functions.items()}
    times = in_turn(functions, rounds)
    if with_literal:
        literal = Literal(model)
        first["literal"] = first_call(lambda: literal(x[:10], y[:10]))
        functions["literal"] = lambda: keep("literal", lambda: literal(x, y))
        # It takes so long that one call must do.
        times["literal"] = [seconds_of(functions["literal"])]
    seconds, ratios = median_seconds(times), median_ratios(times, "plain")
    if with_literal:
        ratios["literal"] = seconds["literal"] / seconds["plain"]
    return [
        {
            "network": name,
            "weights": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
            "examples": count,
            "kind": label,
            "seconds": seconds[label],
            "ratio": ratios[label],
            "first call": first[label][0],
            "peak MiB": peak_memory(function, first[label][1]),
            "value": None if label == "plain" else values[label],
        }
        for label, function in functions.items()
    ]


def compare_replicas(name, count, num_devices, rounds):
    """Print what trials on several logical CPU devices take, relative to one after the other."""
    import tensorflow as tf

    devices = [tf.config.LogicalDeviceConfiguration()] * num_devices
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_devices)])
    with strategy.scope():
        spread, x, y = make(name, count)
    single, _, _ = make(name, count)
    settings = trial_settings(count, 2 * num_devices)
    estimators = [GammaHatEstimator(m, x, y, settings) for m in (single, spread)]
    values = [e.measure().sum(axis=1) for e in estimators]  # compiles both
    times = in_turn({"one": estimators[0].measure, "several": estimators[1].measure}, rounds)
    difference = np.max(np.abs(values[1] / values[0] - 1))
    print(
        f"{name}, N' = {count}: {2 * num_devices} trials on {num_devices} logical CPU devices take "
        f"{median_ratios(times, 'one')['several']:.2f} times what they take on one; "
        f"largest relative difference of a trial {difference:.1e}"
    )


def key_of(row):
    """Return what the rows of one measurement have in common."""
    return row["network"], row["examples"]


def table(report):
    """Return the rows of a report as a table in Markdown."""
    lines = [
        f"{report['versions']}:",
        "",
        "| network | weights | N' | | seconds | plain passes | first call, s | peak, MiB | value |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(report["rows"], key=key_of):
        peak = "" if r["peak MiB"] is None else f"{r['peak MiB']:.0f}"
        value = "" if r["value"] is None else f"{r['value']:.4f}"
        lines.append(
            f"| {r['network']} | {r['weights']} | {r['examples']} | {r['kind']} "
            f"| {r['seconds']:.3f} | {r['ratio']:.2f} | {r['first call']:.1f} | {peak} | {value} |"
        )
    return "\n".join([*lines, ""])


def plot(report, path):
    """Save a picture of the seconds over N', a panel for each network measured at several N'."""
    counts = {}
    for network, count in map(key_of, report["rows"]):
        counts.setdefault(network, set()).add(count)
    networks = sorted(n for n in counts if len(counts[n]) > 1)
    if not networks:
        return
    size = 1 + 2.6 * len(networks), 3.4
    figure, axes = plt.subplots(
        1, len(networks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes.flat, networks):
        rows = [r for r in sorted(report["rows"], key=key_of) if r["network"] == network]
        for kind in dict.fromkeys(r["kind"] for r in rows):
            points = [(r["examples"], r["seconds"]) for r in rows if r["kind"] == kind]
            axis.plot(*zip(*points), "o-", label=kind)
        axis.set(title=network, xlabel="examples N'", xscale="log", yscale="log")
        axis.set_xticks(sorted(counts[network]), sorted(counts[network]))
        axis.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    figure.savefig(path, dpi=120)


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__, docs=False)
    add = parser.add_argument
    networks = ["mlp", "resnet-20", "wrn-28-2", "densenet-bc-100-12"]
    help = "networks to measure (%(default)s)"
    add("--networks", nargs="+", choices=models.NETWORKS, default=networks, help=help)
    help = "numbers N' of examples in a trial (%(default)s)"
    add("--num-examples", type=int, nargs="+", default=[50, 100, 200], help=help)
    add("--rounds", type=int, default=7, help="timed calls of each function (%(default)s)")
    help = "leave out the literal transcription of Eq. 5, which takes long (TensorFlow only)"
    add("--no-literal", action="store_true", help=help)
    help = "measure only the perceptron with 50 examples, in two rounds"
    add("--quick", action="store_true", help=help)
    help = "do nothing but compare trials on so many logical CPU devices with one (TensorFlow)"
    add("--replicas", type=int, help=help)
    settings = parser.parse_args()
    if settings.quick:
        settings.networks, settings.num_examples, settings.rounds = ["mlp"], [50], 2
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    set_precision("float32")
    if settings.replicas:
        for case in itertools.product(settings.networks, settings.num_examples):
            compare_replicas(*case, settings.replicas, settings.rounds)
        return
    report, path = reports.load(settings.output, "gamma_hat")
    for case in itertools.product(settings.networks, settings.num_examples):
        with_literal = BACKEND == "tensorflow" and not settings.no_literal
        rows = measure(*case, settings.rounds, with_literal)
        print(table(report | {"rows": rows}), flush=True)
        report["rows"] = [r for r in report["rows"] if key_of(r) != case] + rows
        reports.save(report, path)
        plot(report, path.with_suffix(".png"))
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
