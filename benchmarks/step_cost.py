"""Time a regularised training step against a plain one of Keras, side by side in one process.

For each network, batch size and number of sub-batches M, all ways to take a step are compiled
first and then timed in turn, round after round: a plain `keras.Model`, the closed gate, both main
gradients, subsets of the sub-batches, both estimators, and (on TensorFlow) a literal transcription
of the paper's algorithm with a second model and assigned weights.

    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --networks resnet-20 mlp --batch-sizes 128 512

prints the tables and adds them, as JSON and as a figure, to those in benchmarks/results/ that were
measured with the same versions on the same kind of machine; `--docs FILE` puts the tables of all
JSON files there between the markers of a Markdown file, without measuring. KERAS_BACKEND chooses
the backend.
"""

import argparse
import itertools
import logging
import pathlib
import statistics
import sys
import time

import keras
import matplotlib
import numpy as np
import report as reports
from machine import BACKEND, peak_memory, set_precision

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from networks import NETWORKS  # noqa: E402

ALPHA, BETA = 1e-4, 10.0


def mlp(num_classes=10):
    """Return a perceptron of two hidden layers for 28 x 28 images."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Flatten()(inputs)
    for _ in range(2):
        x = keras.layers.Dense(512, "relu")(x)
    return inputs, keras.layers.Dense(num_classes)(x)


def make(name, jit, **options):
    """Return a compiled model; without options a plain `keras.Model`."""
    keras.utils.set_random_seed(0)
    base = options.pop("base", RegularizedModel if options else keras.Model)
    model = base(*(mlp if name == "mlp" else NETWORKS[name])())
    if base is RegularizedModel:
        options = {"regularizer": SubBatchPerturbation(ALPHA, BETA, **options)}
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
        **options,
    )
    return model


def literal(name, jit, count):
    """Return a plain model whose step is the paper's Algorithm 1, read to the letter."""
    import tensorflow as tf

    twin = keras.Model(*(mlp if name == "mlp" else NETWORKS[name])())

    class Literal(keras.Model):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                predictions = self(x, training=True)
                loss = self.compute_loss(x, y, predictions)
            gradients = tape.gradient(loss, self.trainable_variables)
            for x_i, y_i in zip(tf.split(x, count), tf.split(y, count)):
                for copy, variable in zip(twin.variables, self.variables):
                    copy.assign(variable)
                g = self.twin_gradients(x_i, y_i)
                for copy, variable, d in zip(twin.trainable_variables, self.trainable_variables, g):
                    copy.assign(variable - ALPHA * d)
                h = self.twin_gradients(x_i, y_i)
                gradients = [t + BETA / count * (a - b) for t, a, b in zip(gradients, g, h)]
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
            return self.compute_metrics(x, y, predictions)

        def twin_gradients(self, x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.loss(y, twin(x, training=True)))
            return tape.gradient(loss, twin.trainable_variables)

    return make(name, jit, base=Literal)


def make_models(name, jit, count):
    """Yield the names of the kinds of steps, and models that take them."""
    options = {"num_sub_batches": count}
    kinds = {"plain": {}, "closed gate": options}
    for main in ("sub_batches", "full_batch"):
        kinds[main] = chosen = options | {"main_gradient": main}
        for part in (2, 4):
            kinds[f"{main}, M/{part} perturbed"] = chosen | {"num_perturbed": count // part}
        kinds[f"{main}, Hessian-vector product"] = chosen | {"estimator": "hessian_vector_product"}
    for label, arguments in kinds.items():
        model = make(name, jit, **arguments)
        if label == "closed gate":
            model.regularizer_active = False
        yield label, model
    if BACKEND == "tensorflow":
        yield "literal", literal(name, jit, count)


def measure(name, batch_size, count, jit, rounds, kinds=None):
    """Return the rows of one table: dictionaries with the figures of each model."""
    rng = np.random.default_rng(0)
    shape = (28, 28, 1) if name == "mlp" else (32, 32, 3)
    x = rng.normal(size=(batch_size, *shape)).astype("float32")
    y = rng.integers(10, size=batch_size).astype("int32")
    make(name, jit).train_on_batch(x, y)  # what the framework does once
    steps, first = {}, {}
    for label, model in make_models(name, jit, count):
        if kinds and label not in kinds:
            continue
        start = time.perf_counter()
        model.train_on_batch(x, y)
        first[label] = time.perf_counter() - start
        model.train_on_batch(x, y)
        steps[label] = model.train_on_batch
    times = {label: [] for label in steps}
    start = time.perf_counter()
    while len(times["plain"]) < rounds or time.perf_counter() - start < 10:
        for label, step in steps.items():
            before = time.perf_counter()
            step(x, y)
            times[label].append(time.perf_counter() - before)
    # The ratio of each round, whose steps see the same load of the machine.
    ratios = {k: [t / p for t, p in zip(v, times["plain"])] for k, v in times.items()}
    return [
        {
            "network": name,
            "batch size": batch_size,
            "M": count,
            "step": label,
            "seconds": statistics.median(times[label]),
            "ratio": statistics.median(ratios[label]),
            "first call": first[label],
            "first call ratio": first[label] / first["plain"],
            "peak MiB": peak_memory(lambda s=step: s(x, y)),
        }
        for label, step in steps.items()
    ]


def key_of(row):
    """Return what a table is of."""
    return row["network"], row["batch size"], row["M"]


def table(report):
    """Return the rows of a report as Markdown, a table for each network, batch size and M."""
    lines = []
    for key in sorted(set(map(key_of, report["rows"]))):
        network, batch_size, count = key
        lines += [
            f"**{network}, batch {batch_size}, M = {count}** ({report['versions']})",
            "",
            "| step | seconds | plain steps | first call, s | plain ones | peak, MiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for r in report["rows"]:
            if key_of(r) == key:
                peak = "" if r["peak MiB"] is None else f"{r['peak MiB']:.0f}"
                lines.append(
                    f"| {r['step']} | {r['seconds']:.3f} | {r['ratio']:.2f} "
                    f"| {r['first call']:.1f} | {r['first call ratio']:.1f} | {peak} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(report, path):
    """Save a picture of the ratios, a panel for each network, batch size and M."""
    keys = sorted(set(map(key_of, report["rows"])))
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 + 2.6 * columns, 3.6 * lines), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    for axis, key in zip(axes.flat, keys):
        rows = [r for r in report["rows"] if key_of(r) == key]
        bars = axis.barh([r["step"] for r in rows], [r["ratio"] for r in rows])
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.margins(x=0.2)
        axis.set(title="{}, batch {}, M = {}".format(*key), xlabel="plain steps")
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)


def parse():
    """Return the settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    networks = ["mlp", "resnet-20", "wrn-28-2"]
    add("--networks", nargs="+", choices=["mlp", *NETWORKS], default=networks)
    add("--batch-sizes", type=int, nargs="+", default=[128, 512])
    add("--num-sub-batches", type=int, nargs="+", default=[8, 16])
    add("--steps", nargs="+", help="the rows of the tables, `plain` among them; all unless given")
    add("--rounds", type=int, default=10, help="steps of each kind, at least (%(default)s)")
    add("--jit", action="store_true", help="compile with XLA or torch.compile")
    add("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    add("--quick", action="store_true", help="the perceptron, batch 128, M = 8, alone")
    add("--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    add("--docs", type=pathlib.Path, help="write the tables into this file, measure nothing")
    settings = parser.parse_args()
    if settings.quick:
        settings.networks, settings.batch_sizes, settings.num_sub_batches = ["mlp"], [128], [8]
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    if settings.docs:
        reports.write_docs(settings.output, "step_cost", table, settings.docs)
        return
    set_precision(settings.precision)
    logging.getLogger("tensorflow").setLevel("ERROR")  # which warns of one trace for each model
    jit = settings.jit or BACKEND == "jax"  # which has no other graphs
    precision_and_jit = [settings.precision] + ["jit"] * settings.jit
    report, path = reports.load(settings.output, "step_cost", *precision_and_jit)
    cases = itertools.product(settings.networks, settings.batch_sizes, settings.num_sub_batches)
    for case in cases:
        rows = measure(*case, jit, settings.rounds, settings.steps)
        print(table(report | {"rows": rows}), flush=True)
        report["rows"] = [r for r in report["rows"] if key_of(r) != case] + rows
        reports.save(report, path)
        plot(report, path.with_suffix(".png"))
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
