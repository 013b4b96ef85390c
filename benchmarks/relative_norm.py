"""Print how large what a rule adds is beside the training gradient, for several strengths.

A small convolution network is trained on 500 of scikit-learn's digits, a fifth of which have a
wrong label, as in examples/quickstart.py: the learning rate drops and the gate opens after a
quarter of the epochs. The norm is logged by `compile(log_regularizer_norm=True)`.

    python benchmarks/relative_norm.py --quick
    python benchmarks/relative_norm.py

prints the table and adds it, as JSON, to those in benchmarks/results/; `--docs FILE` puts it
between the markers of a file, without training. KERAS_BACKEND chooses the backend.
"""

import itertools

import keras
import models  # noqa: F401  (makes the modules of the examples importable)
import numpy as np
import report as reports
from compare_methods import make_model
from images import digits

from keras_infomcr import StartRegAfterLRDrop
from keras_infomcr.regularizers import SharpnessAware, SubBatchPerturbation

RULES = {
    "plain": lambda: None,
    "SubBatchPerturbation()": SubBatchPerturbation,
    **{
        f"SubBatchPerturbation(alpha=1e-2, beta={b:g})": lambda b=b: SubBatchPerturbation(1e-2, b)
        for b in (1.0, 10.0)
    },
    **{
        f"SharpnessAware(rho={rho:g})": lambda rho=rho: SharpnessAware(rho)
        for rho in (0.05, 0.2, 0.5)
    },
    **{
        f"SharpnessAware(rho={rho:g}, adaptive=True)": lambda rho=rho: SharpnessAware(
            rho, adaptive=True
        )
        for rho in (0.5, 2.0)
    },
}


def make(rule, drop_step):
    """Return the network of the quickstart, compiled."""
    keras.utils.set_random_seed(0)
    model = make_model()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([drop_step], [0.1, 0.02])
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=rule,
        log_regularizer_norm=rule is not None,
    )
    return model


def measure(name, epochs):
    """Return the row of a rule."""
    generator = np.random.default_rng(0)
    x, y = digits(generator)
    x, y = x[:500], y[:500]
    y[:100] = (y[:100] + generator.integers(1, 10, 100)) % 10
    model = make(RULES[name](), max(1, epochs // 4) * 5 - 1)
    callbacks = [] if model.regularizer is None else [StartRegAfterLRDrop()]
    history = model.fit(x, y, 100, epochs, verbose=0, callbacks=callbacks).history
    norms = [v for key, v in history.items() if key.endswith("_relative_norm")]
    acted = [float(v) for v in itertools.chain(*norms) if np.isfinite(v)] or [0.0]
    row = {"rule": name, "first epoch": acted[0], "last epoch": acted[-1]}
    return row | {"loss": [float(v) for v in history["loss"]][-1]}


def table(report):
    """Return the rows of a report as Markdown."""
    lines = [f"({report['versions']})", ""]
    lines += [
        "| rule | relative norm, first epoch with the gate open | last epoch | training loss |"
    ]
    lines += ["|---|---:|---:|---:|"]
    for r in report["rows"]:
        cells = [f"{r['first epoch']:.2g}", f"{r['last epoch']:.2g}", f"{r['loss']:.3f}"]
        lines.append(f"| `{r['rule']}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main():
    """Train, print and save."""
    parser = reports.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of a run (%(default)s)")
    help = "two rules and two epochs, to see that it works"
    parser.add_argument("--quick", action="store_true", help=help)
    settings = parser.parse_args()
    if settings.docs:
        reports.write_docs(settings.output, "relative_norm", table, settings.docs)
        return
    names, epochs = (list(RULES)[:2], 2) if settings.quick else (list(RULES), settings.epochs)
    report, path = reports.load(settings.output, "relative_norm")
    report["rows"] = [measure(name, epochs) for name in names]
    print(table(report), flush=True)
    reports.save(report, path)


if __name__ == "__main__":
    main()
