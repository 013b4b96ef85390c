"""Run the comparison of examples/quickstart.py on eight seeds.

Each seed draws the training digits, the wrong labels, the initial weights and the order of the
batches, which are the same for both runs. The settings of the quickstart were chosen on the seeds
100 to 103, by the test loss and the jump of the training loss where the regulariser starts;
the seeds 0 to 7, which are reported, had no part in that.

    python benchmarks/quickstart_seeds.py --quick
    python benchmarks/quickstart_seeds.py

prints the table and keeps it as JSON in benchmarks/results/, which the quickstart draws; `--docs
FILE` puts the table between the markers of a file too, without training: README.md and
examples/quickstart.py have it. KERAS_BACKEND chooses the backend.
"""

import contextlib
import io
import os
import runpy
import tempfile

import keras
import models
import numpy as np
import report as reports

EPOCHS = 40

# What the two runs are judged by: the name in the table, its format, and whether smaller (-1) or
# larger (1) is better, or neither (0).
MEASURES = {
    "test_accuracy": ("test accuracy", ".2%", 1),
    "test_loss": ("test loss", ".3f", -1),
    "gamma_hat": ("gamma-hat, normalised", ".0f", -1),
    "best_test_accuracy": ("test accuracy of the best epoch", ".2%", 1),
    "training_loss": ("training loss, wrong labels included", ".3f", 0),
}


def run_quickstart(seed, epochs, folder):
    """Run the quickstart, without what it prints; return the variables that it leaves."""
    os.environ["QUICKSTART_SEED"] = str(seed)
    os.environ["QUICKSTART_EPOCHS"] = str(epochs)
    os.environ["QUICKSTART_OUTPUT"] = str(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(str(models.EXAMPLES / "quickstart.py"))


def comparison(report):
    """Return the lines of the table over the seeds of a report."""
    rows = report["rows"]
    first, last = rows[0]["seed"], rows[-1]["seed"]
    lines = [
        f"{len(rows)} seeds, {first} to {last}, {report['epochs']} epochs each; "
        "mean +- standard deviation",
        f"({report['versions']})",
        f"{'':<37}{'plain':>18}{'regularised':>18}{'difference':>18}{'better':>8}",
    ]
    for key, (label, form, sign) in MEASURES.items():
        runs = "plain", "regularised"
        plain, regularised = (np.array([row[name][key] for row in rows]) for name in runs)
        differences = regularised - plain
        cells = [
            f"{values.mean():{form}} +- {values.std(ddof=1):{form}}"
            for values in (plain, regularised)
        ]
        cells.append(f"{differences.mean():+{form}} +- {differences.std(ddof=1):{form}}")
        better = f"{np.sum(sign * differences > 0)} of {len(rows)}" if sign else ""
        cells = "".join(f"{cell:>18}" for cell in cells)
        lines.append(f"{label:<37}{cells}{better:>8}".rstrip())
    return lines


def table(report):
    """Return the comparison as a block of a Markdown file."""
    return "\n".join(["```", *comparison(report), "```", ""])


def main():
    """Train on each seed that the report has not got, print the table."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "seeds to run, unless the report has them already (%(default)s)"
    add("--seeds", type=int, nargs="+", default=list(range(8)), help=help)
    add("--epochs", type=int, default=EPOCHS, help="epochs of each run (%(default)s)")
    add("--quick", action="store_true", help="two seeds and two epochs, to see that it works")
    options = parser.parse_args()
    if options.docs:
        reports.write_docs(options.output, "quickstart_seeds", table, options.docs)
        return
    if options.quick:
        options.seeds, options.epochs = options.seeds[:2], 2
    report, path = reports.load(options.output, "quickstart_seeds")
    if report.get("epochs") != options.epochs:
        report |= {"epochs": options.epochs, "rows": []}
    done = {row["seed"] for row in report["rows"]}
    for seed in options.seeds:
        if seed in done:
            continue
        with tempfile.TemporaryDirectory() as folder:  # the picture of each seed is not kept
            runs = run_quickstart(seed, options.epochs, folder)["runs"]
        report["rows"].append({"seed": seed, **runs})
        reports.save(report, path)
        keras.utils.clear_session()
        print(f"seed {seed}", flush=True)
    print("", *comparison(report), sep="\n")


if __name__ == "__main__":
    main()
