"""Time a regularised training step against a plain one of Keras, side by side in one process.

For each network, batch size and number of sub-batches M, all ways to take a step are compiled
first and then timed in turn, round after round: a plain `keras.Model`, the closed gate, InfoMCR
with both main gradients, subsets of the sub-batches and both estimators, all other rules, three
replicas that share the batch, and (on TensorFlow) a literal transcription of InfoMCR's algorithm
with a second model and assigned weights.

    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --networks resnet-20 mlp --batch-sizes 128 512

prints the tables and adds them, as JSON and as a figure, to those in benchmarks/results/ that were
measured with the same versions on the same kind of machine, from which `performance.py` makes the
tables of docs/performance.md. KERAS_BACKEND chooses the backend.
"""

import functools
import itertools
import logging

import keras
import matplotlib
import report as reports
from machine import BACKEND, first_call, peak_memory, set_precision
from models import NETWORKS, make, random_data
from timing import in_turn, median_ratios, median_seconds

from keras_infomcr import RegularizedModel
from keras_infomcr.models import ReplicatedModel
from keras_infomcr.regularizers import (
    EntropySGD,
    SharpnessAware,
    SpectralRadius,
    SubBatchPerturbation,
    WeightNoise,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ALPHA, BETA = 1e-4, 10.0


def literal(name, count, **compile_options):
    """Return a plain model whose step is the paper's Algorithm 1, read to the letter."""
    import tensorflow as tf

    twin = keras.Model(*NETWORKS[name]())

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

    return make(name, Literal, **compile_options)


def regularizers(count):
    """Return the regularisers to measure, `None` for Keras's step, by the names in the tables."""
    options = {"num_sub_batches": count}
    kinds = {"closed gate": options}
    for main in ("sub_batches", "full_batch"):
        kinds[main] = chosen = options | {"main_gradient": main}
        for part in (2, 4):
            kinds[f"{main}, M/{part} perturbed"] = chosen | {"num_perturbed": count // part}
        kinds[f"{main}, Hessian-vector product"] = chosen | {"estimator": "hessian_vector_product"}
    infomcr = {label: SubBatchPerturbation(ALPHA, BETA, **kinds[label]) for label in kinds}
    return {
        "plain": None,
        **infomcr,
        "SAM": SharpnessAware(),
        "ASAM": SharpnessAware(rho=0.5, adaptive=True),
        "m-SAM": SharpnessAware(num_sub_batches=count),
        "F-SAM": SharpnessAware(direction="noise"),
        "weight noise": WeightNoise(),
        "spectral radius": SpectralRadius(),
        "Entropy-SGD": EntropySGD(num_steps=count),
    }


def _replicated(*args, num_replicas):
    return ReplicatedModel(keras.Model(*args), num_replicas)


def make_models(name, count, kinds=None, **compile_options):
    """Yield the names of the kinds of steps, all or those given, and models that take them."""
    for label, regularizer in regularizers(count).items():
        if kinds and label not in kinds:
            continue
        if regularizer is None:
            yield label, make(name, **compile_options)
            continue
        model = make(name, RegularizedModel, regularizer=regularizer, **compile_options)
        model.regularizer_active = label != "closed gate"
        yield label, model
    if not kinds or "3 replicas" in kinds:
        model = functools.partial(_replicated, num_replicas=3)
        yield "3 replicas", make(name, model, **compile_options)
    if BACKEND == "tensorflow" and not (kinds and "literal" not in kinds):
        yield "literal", literal(name, count, **compile_options)


def measure(name, batch_size, count, jit, rounds, at_least, kinds=None):
    """Return the rows of one table: dictionaries with the figures of each model."""
    compile_options = {"jit_compile": jit, "metrics": ["accuracy"]}
    model = make(name, **compile_options)
    x, y = random_data(model, batch_size)
    model.train_on_batch(x, y)  # so that no row contains what the framework does only once
    steps, first, of_programs = {}, {}, {}
    for label, model in make_models(name, count, kinds, **compile_options):
        steps[label] = functools.partial(model.train_on_batch, x, y)
        first[label], of_programs[label] = first_call(steps[label])
        steps[label]()  # the second call may still compile something
    times = in_turn(steps, rounds, at_least)
    peaks = {label: peak_memory(step, of_programs[label]) for label, step in steps.items()}
    return rows_of((name, batch_size, count), times, first, peaks)


def rows_of(case, times, first, peaks):
    """Return the rows of steps that were timed in turn, a plain one among them.

    Args:
        case: Tuple of the network's name, the batch size and M.
        times: Dictionary of the lists of seconds of each step, from `in_turn`.
        first: Dictionary of the seconds of each first call.
        peaks: Dictionary of MiB, or `None`.
    """
    seconds, ratios = median_seconds(times), median_ratios(times, "plain")
    return [
        {
            **dict(zip(("network", "batch size", "M"), case)),
            "step": label,
            "seconds": seconds[label],
            "ratio": ratios[label],
            "first call": first[label],
            "first call ratio": first[label] / first["plain"],
            "peak MiB": peaks[label],
        }
        for label in times
    ]


def key_of(row):
    """Return what all rows of one table have in common."""
    return row["network"], row["batch size"], row["M"]


def merged(rows, new):
    """Return the rows of a report with new ones, which replace those of the same case and step.

    Where some steps were measured alone, the figures of the other steps stay, with the plain step
    that they were measured beside.
    """
    if not any(key_of(r) == key_of(new[0]) for r in rows):
        return rows + new
    steps = {r["step"] for r in new if r["step"] != "plain"}
    old = [r for r in rows if key_of(r) == key_of(new[0]) and r["step"] not in steps]
    others = [r for r in rows if key_of(r) != key_of(new[0])]
    whole = {r["step"] for r in old} == {"plain"}
    return others + (new if whole else old + [r for r in new if r["step"] != "plain"])


def table(report):
    """Return the rows of a report as Markdown, a table for each network, batch size and M."""
    lines = []
    for key in sorted(set(map(key_of, report["rows"]))):
        network, batch_size, count = key
        lines += [
            f"**{network}, batch {batch_size}, M = {count}** ({report['versions']})",
            "",
            "| step | seconds | step time, times plain | first call, s | first call, times plain "
            "| peak, MiB |",
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
        axis.set(title="{}, batch {}, M = {}".format(*key), xlabel="step time, times plain")
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__, docs=False)
    add = parser.add_argument
    networks = ["mlp", "resnet-20", "wrn-28-2"]
    help = "networks to measure (%(default)s)"
    add("--networks", nargs="+", choices=NETWORKS, default=networks, help=help)
    help = "numbers of examples in a batch (%(default)s)"
    add("--batch-sizes", type=int, nargs="+", default=[128, 512], help=help)
    help = "numbers M of sub-batches that a batch is cut into (%(default)s)"
    add("--num-sub-batches", type=int, nargs="+", default=[8, 16], help=help)
    help = "kinds of steps, by the names in the tables; `plain` must be one of them (all kinds)"
    add("--steps", nargs="+", help=help)
    add(
        "--rounds",
        type=int,
        default=10,
        help="least number of timed steps of each kind (%(default)s)",
    )
    help = "least number of seconds in which the steps of one table are timed (%(default)s)"
    add("--seconds", type=float, default=10, help=help)
    add("--jit", action="store_true", help="compile the steps with XLA or torch.compile")
    help = "precision of matrix products and convolutions (%(default)s)"
    add("--precision", choices=["float32", "tf32", "bfloat16"], default="float32", help=help)
    help = "measure only the perceptron, with batches of 128 and M = 8"
    add("--quick", action="store_true", help=help)
    settings = parser.parse_args()
    if settings.quick:
        settings.networks, settings.batch_sizes, settings.num_sub_batches = ["mlp"], [128], [8]
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    set_precision(settings.precision)
    # TensorFlow warns of many traces, but each model needs one.
    logging.getLogger("tensorflow").setLevel("ERROR")
    jit = settings.jit or BACKEND == "jax"  # JAX compiles with XLA or not at all
    precision_and_jit = [settings.precision] + ["jit"] * settings.jit
    report, path = reports.load(settings.output, "step_cost", *precision_and_jit)
    cases = itertools.product(settings.networks, settings.batch_sizes, settings.num_sub_batches)
    for case in cases:
        rows = measure(*case, jit, settings.rounds, settings.seconds, settings.steps)
        print(table(report | {"rows": rows}), flush=True)
        report["rows"] = merged(report["rows"], rows)
        reports.save(report, path)
        plot(report, path.with_suffix(".png"))
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
