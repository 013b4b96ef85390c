"""Time whole runs of `fit`: plain, regularised throughout, and regularised in the late phase alone.

A run of a small convolution network on random images is timed for each kind, in turn and round
after round, after a first run that compiles. Beside the measured ratio stands the arithmetic,
1 + last_fraction (c - 1), with c the ratio of the run that is regularised throughout.

    python benchmarks/late_phase.py --last-fractions 0.1 0.3

prints a table and adds it, as JSON, to those in benchmarks/results/. KERAS_BACKEND chooses the
backend.
"""

import functools

import report as reports
from models import make, random_data
from timing import in_turn, median_ratios, median_seconds

from keras_infomcr import RegularizedModel, regularizers
from keras_infomcr.callbacks import StartRegInLatePhase


def make_run(name, rule, fraction, settings):
    """Return a function that trains a fresh state of one model for all epochs."""
    regularizer = {} if rule is None else {"regularizer": regularizers.get(rule)}
    model = make(name, *([RegularizedModel] if rule else []), **regularizer)
    x, y = random_data(model, settings.batches * settings.batch_size)
    callbacks = [] if fraction is None else [StartRegInLatePhase(fraction)]
    fit = functools.partial(model.fit, x, y, settings.batch_size, settings.epochs, verbose=0)
    return lambda: fit(callbacks=callbacks)


def measure(settings):
    """Return the rows of the table."""
    kinds = {"plain": (None, None), "throughout": (settings.rule, None)}
    kinds |= {f"last {f:.0%}": (settings.rule, f) for f in settings.last_fractions}
    runs = {k: make_run(settings.network, *kind, settings) for k, kind in kinds.items()}
    for run in runs.values():
        run()  # compiles both positions of the gate
    times = in_turn(runs, settings.rounds)
    seconds, ratios = median_seconds(times), median_ratios(times, "plain")
    rows = []
    for label, (rule, fraction) in kinds.items():
        share = 0.0 if rule is None else fraction or 1.0
        epochs = max(share > 0, round(share * settings.epochs))
        expected = 1 + epochs / settings.epochs * (ratios["throughout"] - 1)
        row = {"network": settings.network, "rule": settings.rule, "run": label}
        rows.append(
            row | {"seconds": seconds[label], "ratio": ratios[label], "arithmetic": expected}
        )
    return rows


def table(report):
    """Return the rows of a report as Markdown."""
    lines = [f"({report['versions']})", ""]
    lines += ["| network | rule | run | seconds | plain runs | by arithmetic |"]
    lines += ["|---|---|---|---:|---:|---:|"]
    for r in report["rows"]:
        head = f"| {r['network']} | `{r['rule']}` | {r['run']} "
        lines.append(head + f"| {r['seconds']:.2f} | {r['ratio']:.2f} | {r['arithmetic']:.2f} |")
    return "\n".join([*lines, ""])


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    add("--network", default="resnet-20", help="network of examples/networks.py (%(default)s)")
    add("--rule", default="sharpness_aware", help="name of the regulariser (%(default)s)")
    help = "parts of the epochs that are regularised (%(default)s)"
    add("--last-fractions", type=float, nargs="+", default=[0.3], help=help)
    add("--epochs", type=int, default=10, help="epochs of a run (%(default)s)")
    add("--batches", type=int, default=4, help="batches of an epoch (%(default)s)")
    add("--batch-size", type=int, default=32, help="examples in a batch (%(default)s)")
    add("--rounds", type=int, default=3, help="timed runs of each kind (%(default)s)")
    return parser.parse_args()


def main():
    """Measure, print and save."""
    settings = parse()
    if settings.docs:
        reports.write_docs(settings.output, "late_phase", table, settings.docs)
        return
    report, path = reports.load(settings.output, "late_phase")
    rows = measure(settings)
    print(table(report | {"rows": rows}), flush=True)
    key = settings.network, settings.rule
    report["rows"] = [r for r in report["rows"] if (r["network"], r["rule"]) != key] + rows
    reports.save(report, path)


if __name__ == "__main__":
    main()
