"""Time steps of InfoMCR on perceptrons: all sub-batches at once against one after the other.

Networks of Dense layers take all sub-batches at once, in two passes over the batch, where these are
short. This prints what is gained by it, beside a plain step of Keras, for several numbers M of
sub-batches up to the size of the batch:

    python benchmarks/dense_slices.py --quick
    python benchmarks/dense_slices.py --batch-sizes 128 512

The tables are saved as JSON in benchmarks/results/; `--docs FILE` puts the tables of all JSON files
there between the markers of a Markdown file, without measuring. KERAS_BACKEND chooses the backend.
"""

import functools
import itertools
import logging
import time
from unittest import mock

import keras
import report as reports
from machine import BACKEND, peak_memory, set_precision
from models import make, random_data
from timing import in_turn, median_ratios, median_seconds, seconds_of

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation, dense_slices

PLAIN, AT_ONCE, IN_TURN = "plain", "at once", "in turn"
NETWORK = "mlp"


def steps_of(x, y, count, longest=32, **compile_options):
    """Return models by the names in the table, and their steps on a batch.

    Args:
        x: Array of inputs.
        y: Array of labels.
        count: Integer, the number of sub-batches.
        longest: Integer, the number of sub-batches beyond which they are not taken in turn.
        **compile_options: Arguments of `compile`.
    """
    models = {PLAIN: make(NETWORK, **compile_options)}
    for label in (AT_ONCE, IN_TURN)[: 1 + (count <= longest)]:
        rule = SubBatchPerturbation(num_sub_batches=count)
        models[label] = make(NETWORK, RegularizedModel, regularizer=rule, **compile_options)
    steps = {label: functools.partial(m.train_on_batch, x, y) for label, m in models.items()}
    if IN_TURN in steps:
        # No sub-batch is short enough. This is read when a step is traced, on torch in each.
        never = mock.patch.object(dense_slices, "LONGEST", 0)
        steps[IN_TURN] = never(steps[IN_TURN])
    return models, steps


def cpu_ratios(steps, rounds):
    """Return the processor time of each step, all cores together, divided by the plain step's."""
    seconds = dict.fromkeys(steps, 0.0)
    for _ in range(rounds):
        for label, step in steps.items():
            start = time.process_time()
            step()
            seconds[label] += time.process_time() - start
    return {label: s / seconds[PLAIN] for label, s in seconds.items()}


def measure(batch_size, count, rounds, jit):
    """Return the rows of one batch size and number of sub-batches."""
    data = random_data(make(NETWORK), batch_size)
    _, steps = steps_of(*data, count, jit_compile=jit)
    steps[PLAIN]()  # so that no row contains what the framework does only once
    first = {label: seconds_of(step) for label, step in steps.items()}
    for step in steps.values():
        step()  # the second call may still compile something
    times = in_turn(steps, rounds, at_least=0.5 * rounds)
    seconds, ratios = median_seconds(times), median_ratios(times, PLAIN)
    of_cpu = cpu_ratios(steps, rounds)
    return [
        {
            "batch size": batch_size,
            "M": count,
            "step": label,
            "seconds": seconds[label],
            "ratio": ratios[label],
            "CPU ratio": of_cpu[label],
            "first call": first[label],
            "peak MiB": peak_memory(step),
        }
        for label, step in steps.items()
    ]


def key_of(row):
    """Return what all rows of one measurement have in common."""
    return row["batch size"], row["M"]


def table(report):
    """Return the rows of a report as Markdown."""
    lines = [
        f"**Perceptron 784-512-512-10** ({report['versions']})",
        "",
        "| batch | M | step | seconds | step time, times plain | processor time, times plain "
        "| first call, s | peak, MiB |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(report["rows"], key=key_of):
        peak = "" if r["peak MiB"] is None else f"{r['peak MiB']:.0f}"
        lines.append(
            f"| {r['batch size']} | {r['M']} | {r['step']} | {r['seconds']:.4f} | {r['ratio']:.2f} "
            f"| {r['CPU ratio']:.2f} | {r['first call']:.1f} | {peak} |"
        )
    return "\n".join([*lines, ""])


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "numbers of examples in a batch (%(default)s)"
    add("--batch-sizes", type=int, nargs="+", default=[128, 512], help=help)
    help = "numbers M of sub-batches that a batch is cut into (%(default)s)"
    add("--num-sub-batches", type=int, nargs="+", default=[8, 32, 64, 128], help=help)
    help = "least number of timed steps of each kind (%(default)s)"
    add("--rounds", type=int, default=10, help=help)
    add("--jit", action="store_true", help="compile the steps with XLA or torch.compile")
    help = "measure only a batch of 128 with M = 8, in two rounds"
    add("--quick", action="store_true", help=help)
    settings = parser.parse_args()
    if settings.quick:
        settings.batch_sizes, settings.num_sub_batches, settings.rounds = [128], [8], 2
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    if settings.docs:
        reports.write_docs(settings.output, "dense_slices", table, settings.docs)
        return
    set_precision("float32")
    # TensorFlow warns of many traces, but each model needs one.
    logging.getLogger("tensorflow").setLevel("ERROR")
    jit = settings.jit or BACKEND == "jax"  # JAX compiles with XLA or not at all
    report, path = reports.load(settings.output, "dense_slices", *["jit"] * settings.jit)
    for case in itertools.product(settings.batch_sizes, settings.num_sub_batches):
        rows = measure(*case, settings.rounds, jit)
        print(table(report | {"rows": rows}), flush=True)
        report["rows"] = [r for r in report["rows"] if key_of(r) != case] + rows
        reports.save(report, path)
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
