"""Time the paired evaluations of a batch's sub-batches, in turn and side by side, on JAX or torch.

InfoMCR takes the gradient of the loss of each of M sub-batches at w and at w - alpha g_i. The
variants take them one after the other, as the package does; in one compiled loop (JAX); side by
side by `vmap`, in the first pass with shared weights and in the second with weights for each
sub-batch, or in the first pass alone; and, on a GPU with torch, as a CUDA graph and compiled. Each
is timed in turn with the gradient of the whole batch. The last column says how far the difference
of the gradients at w and at w - alpha g_i is from the difference that the first variant gives.

    KERAS_BACKEND=jax python benchmarks/slices_side_by_side.py --networks resnet-20 --output FOLDER

prints a table and saves it as JSON after each variant, so that a run can be stopped. What fails has
a row that says why. `--docs FILE` puts the tables of all JSON files in FOLDER between the markers
of a Markdown file, without measuring.
"""

import functools
import itertools
import statistics

import keras
import numpy as np
import report as reports
from keras import ops
from machine import BACKEND, is_gpu, peak_memory, set_precision
from models import NETWORKS, make, random_data
from paired_evaluations import REFERENCE, Passes, Skipped, calls, compiled
from timing import in_turn, median_ratios, seconds_of

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch


def finished(call):
    """Return the call, which returns when the device has done its work."""

    def until_done():
        results = call()
        if BACKEND == "jax":
            jax.block_until_ready(results)
        elif is_gpu():
            torch.cuda.synchronize()
        return results

    return until_done


def difference_of_gradients(results):
    """Return the mean of the g_i minus the mean of the gradients at w - alpha g_i, flat."""
    pairs = zip(results.gradient, results.gradient_moved)
    differences = [ops.convert_to_numpy(g - h).ravel() for g, h in pairs]
    return np.concatenate(differences).astype("float64")


def measure(name, batch_size, count, rounds):
    """Yield the rows of one network, batch size and number of sub-batches."""
    model = make(name)
    x, y = map(ops.convert_to_tensor, random_data(model, batch_size))
    passes = Passes(model)
    cut = [ops.reshape(a, (count, batch_size // count, *a.shape[1:])) for a in (x, y)]

    def whole(passes, x, y):
        return passes.one(passes.weights, x, y)

    plain = finished(functools.partial(compiled(whole, passes), x, y))
    plain()
    plain()
    reference = None
    for variant, prepare in calls(passes, *cut):
        row = {"network": name, "batch size": batch_size, "M": count, "variant": variant}
        try:
            figures, results = time_variant(prepare, plain, rounds)
            reference = results if variant == REFERENCE else reference
            figures["difference"] = relative_difference(results, reference)
        except Skipped as reason:
            figures = {"error": f"left out: {reason}"}
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
        yield row | figures


def time_variant(prepare, plain, rounds):
    """Return the figures of one variant, and its numbers."""
    call = None

    def first_call():
        nonlocal call
        call = finished(prepare())
        call()

    first = seconds_of(first_call)
    results = difference_of_gradients(call())
    times = in_turn({"plain": plain, "variant": call}, rounds)
    figures = {
        "seconds": statistics.median(times["variant"]),
        "ratio": median_ratios(times, "plain")["variant"],
        "first call": first,
        "peak MiB": peak_memory(call),
    }
    return figures, results


def relative_difference(results, reference):
    """Return how far the numbers are from the reference's, `None` if it has failed."""
    if reference is None:
        return None
    return float(np.linalg.norm(results - reference) / np.linalg.norm(reference))


def key_of(row):
    """Return what all rows of one table have in common."""
    return row["network"], row["batch size"], row["M"]


def table(report):
    """Return the rows of a report as Markdown, a table for each network, batch size and M."""
    lines = []
    for key in sorted(set(map(key_of, report["rows"]))):
        lines += [
            "**{}, batch {}, M = {}** ({})".format(*key, report["versions"]),
            "",
            "| evaluations | seconds | times a pass over the batch | first call, s | peak, MiB "
            "| relative difference |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_line(r) for r in report["rows"] if key_of(r) == key]
        lines.append("")
    return "\n".join(lines)


def _line(row):
    if "error" in row:
        return f"| {row['variant']} | {row['error'].replace('|', ' ')} | | | | |"
    peak = "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}"
    difference = "" if row["difference"] is None else f"{row['difference']:.0e}"
    return (
        f"| {row['variant']} | {row['seconds']:.4f} | {row['ratio']:.2f} | {row['first call']:.1f} "
        f"| {peak} | {difference} |"
    )


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "networks to measure (%(default)s)"
    add("--networks", nargs="+", choices=NETWORKS, default=["resnet-20"], help=help)
    help = "numbers of examples in a batch (%(default)s)"
    add("--batch-size", type=int, nargs="+", default=[128], help=help)
    help = "numbers M of sub-batches, each a divisor of the batch size (%(default)s)"
    add("--num-sub-batches", type=int, nargs="+", default=[8], help=help)
    add("--rounds", type=int, default=5, help="timed calls of each variant (%(default)s)")
    add("--quick", action="store_true", help="measure only the perceptron, batch 16 and M = 2")
    settings = parser.parse_args()
    if settings.quick:
        settings.networks, settings.batch_size, settings.num_sub_batches = ["mlp"], [16], [2]
        settings.rounds = 2
    if any(b % m for b in settings.batch_size for m in settings.num_sub_batches):
        parser.error("each of --num-sub-batches must divide each --batch-size")
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    if settings.docs:
        reports.write_docs(settings.output, "slices_side_by_side", table, settings.docs)
        return
    if BACKEND == "tensorflow":
        raise SystemExit(
            "There is nothing to measure on TensorFlow: use KERAS_BACKEND=jax or torch"
        )
    set_precision("float32")
    report, path = reports.load(settings.output, "slices_side_by_side")
    for case in itertools.product(settings.networks, settings.batch_size, settings.num_sub_batches):
        report["rows"] = [r for r in report["rows"] if key_of(r) != case]
        for row in measure(*case, settings.rounds):
            print(_line(row), flush=True)
            report["rows"].append(row)
            reports.save(report, path)
        print(table(report | {"rows": [r for r in report["rows"] if key_of(r) == case]}))
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
