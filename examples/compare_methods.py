"""Train one network by twelve methods, and see which of them err less than plain training.

Sharpness-aware minimisation, noise on the weights, averages of weights, InfoMCR and others promise
networks that generalise better. Each is one argument of `compile`, one callback of `fit` or one
model around the network. Here they are compared with plain training, and with plain training for
twice as long, for many methods make two passes over each batch (and the spectral radius a dozen).

Data. Each run trains a convolutional network of 6,154 weights on 500 of scikit-learn's handwritten
digits (nothing is downloaded), with right labels, and again with 10 % wrong labels. A number, the
seed, draws the training digits, the wrong labels, the initial weights and the order of the batches.
These are the same for all methods, so that methods are compared in pairs of runs. 897 other digits,
the same for all seeds, are for the test.

Training. SGD with Nesterov momentum 0.9 and batches of 100, 40 epochs; the learning rate drops to a
fifth after half of them. SAM, ASAM, m-SAM, noise and the penalty on the spectral radius act from
the first step on, InfoMCR from the drop on, as in its paper. One more run has SAM in the last 30 %
of the epochs alone. Entropy-SGD makes one outer step of each epoch, in five inner steps on batches
of 100; its outer rate is 1, then 0.2. Three replicas of Replicated-SGD share each batch; their
coupling grows by 1e4 over the run. So these two, too, pass over the data 40 times; for both,
batch-norm statistics are estimated anew after training.

Tuning. Every method has one hyper-parameter, of which four values were tried (`GRIDS`) with two
seeds of their own, 100 and 101, on validation digits that are never tested on: for plain training
the learning rate, which the other methods take over, and for each of them its strength. The value
of the largest mean validation accuracy was taken (of equals, the smallest validation loss), for
right and for wrong labels apart: `--tune` does all that, and `TUNED` holds what it found.

Run

    python examples/compare_methods.py

It takes some ten minutes on two CPU cores, in two processes; with `--seeds 2 --epochs 4` about
one. You will see the tables, and a picture in output/compare_methods.png.

How to read the tables: "difference" is the mean over the seeds of the test accuracy less that of
the plain run of the same seed, in percentage points, with its 95 % interval (Student's t). p is the
share of the ways to flip the signs of the seeds' differences whose mean is at least as far from 0
(exact, two-sided). "Better" and "worse" are differences whose interval does not hold 0, "alike"
those whose interval lies within 0.5 points of 0, a margin set before the runs; "open" is what these
seeds cannot tell. With eight seeds p cannot be smaller than 0.008. Among eleven comparisons one p
below 0.05 is no surprise: corrected for their number (Holm), no p can be below 0.08 here.

What to expect:

<!-- compare_methods: begin -->
8 seeds, 40 epochs (tensorflow 2.21.0, Keras 3.15.1, 2 CPU cores)

**right labels**

| method | setting | test accuracy | difference | 95 % interval | p | verdict |
|---|---|---:|---:|---:|---:|---|
| plain | rate 0.05 | 97.88 % | | | | |
| plain, twice the epochs | rate 0.05 | 98.01 % | +0.13 | -0.01 to +0.26 | 0.047 | alike |
| InfoMCR | beta 10 | 97.88 % | +0.00 | +0.00 to +0.00 | 1.000 | alike |
| SAM | rho 0.2 | 97.46 % | -0.42 | -0.82 to -0.02 | 0.062 | worse |
| SAM, last 30 % | rho 0.5 | 98.13 % | +0.25 | +0.18 to +0.32 | 0.008 | better |
| m-SAM | rho 0.05 | 97.92 % | +0.04 | -0.30 to +0.38 | 0.812 | alike |
| ASAM | rho 0.25 | 97.92 % | +0.04 | -0.28 to +0.36 | 0.719 | alike |
| noise | std 0.005 | 97.99 % | +0.11 | -0.11 to +0.33 | 0.250 | alike |
| averaging | start 0.9 | 97.87 % | -0.01 | -0.05 to +0.02 | 1.000 | alike |
| spectral radius | strength 0.003 | 98.10 % | +0.22 | -0.01 to +0.46 | 0.039 | alike |
| Entropy-SGD | gamma 0.03 | 97.39 % | -0.49 | -0.80 to -0.18 | 0.016 | worse |
| Replicated-SGD | coupling 1 | 98.09 % | +0.21 | -0.26 to +0.68 | 0.312 | open |

**10 % wrong labels**

| method | setting | test accuracy | difference | 95 % interval | p | verdict |
|---|---|---:|---:|---:|---:|---|
| plain | rate 0.02 | 93.80 % | | | | |
| plain, twice the epochs | rate 0.02 | 93.32 % | -0.47 | -0.93 to -0.02 | 0.062 | worse |
| InfoMCR | beta 1 | 93.66 % | -0.14 | -0.27 to -0.01 | 0.062 | worse |
| SAM | rho 0.2 | 95.58 % | +1.78 | +0.90 to +2.67 | 0.008 | better |
| SAM, last 30 % | rho 0.5 | 94.98 % | +1.18 | +0.52 to +1.85 | 0.016 | better |
| m-SAM | rho 0.2 | 96.46 % | +2.66 | +2.06 to +3.26 | 0.008 | better |
| ASAM | rho 2 | 95.72 % | +1.92 | +1.14 to +2.70 | 0.008 | better |
| noise | std 0.05 | 96.28 % | +2.48 | +1.85 to +3.11 | 0.008 | better |
| averaging | start 0.25 | 94.33 % | +0.53 | +0.16 to +0.90 | 0.023 | better |
| spectral radius | strength 0.03 | 96.53 % | +2.73 | +2.03 to +3.43 | 0.008 | better |
| Entropy-SGD | gamma 0.003 | 94.51 % | +0.71 | -0.23 to +1.65 | 0.141 | open |
| Replicated-SGD | coupling 1 | 93.26 % | -0.54 | -1.47 to +0.38 | 0.211 | open |
<!-- compare_methods: end -->

With wrong labels SAM, its relatives, the noise and the penalty on the spectral radius gain 1.2 to
2.7 points, averaging half a point; the penalty's steps cost several times theirs. Entropy-SGD and
Replicated-SGD gain nothing that eight seeds can tell, and Entropy-SGD loses with right labels. They
learn fewer of the wrong labels by heart: plain training ends with 99 % of the given training labels
right, m-SAM with 91 %. Twice the epochs do harm, for they learn more of them. With right labels no
difference reaches half a point. InfoMCR, tuned, changes next to nothing here; it gains in the
quickstart, whose learning rate is five times as large and was not tuned.

What this does not show: plain training that is stopped early is not among the methods. Some of the
best values lie at an end of their grid (`TUNED`), where a wider grid might gain more. For plain
training on wrong labels, whose best rate does too, half that rate was tried afterwards: as good
within one image (94.0 and 93.9 % in validation). And all is one small network on few small images.
"""

import argparse
import concurrent.futures
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import time

import keras
import matplotlib
import numpy as np
from images import digits
from options import positive
from scipy.stats import t as student_t

from keras_infomcr import RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.callbacks import StartRegInLatePhase, WeightAveraging
from keras_infomcr.flatness import reestimate_batch_norm
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

NUM_TRAIN, NUM_POOL, BATCH_SIZE = 500, 900, 100  # The pool has the training and validation digits.
INNER_STEPS, NUM_REPLICAS = 5, 3  # of Entropy-SGD, in each outer step, and of Replicated-SGD
SHARES_WRONG = {"right labels": 0.0, "10 % wrong labels": 0.1}
MARGIN = 0.5  # Percentage points within which methods count as alike.
TUNING_SEEDS = (100, 101)

PLAIN = "plain"
# The hyper-parameter that is tuned for each method, and its values.
GRIDS = {
    PLAIN: ("rate", (0.02, 0.05, 0.1, 0.2)),
    "plain, twice the epochs": ("rate", (0.02, 0.05, 0.1, 0.2)),
    "InfoMCR": ("beta", (1, 3, 10, 30)),
    "SAM": ("rho", (0.05, 0.1, 0.2, 0.5)),
    "SAM, last 30 %": ("rho", (0.05, 0.1, 0.2, 0.5)),
    "m-SAM": ("rho", (0.05, 0.1, 0.2, 0.5)),
    "ASAM": ("rho", (0.25, 0.5, 1, 2)),
    "noise": ("std", (0.005, 0.01, 0.02, 0.05)),
    "averaging": ("start", (0.25, 0.5, 0.75, 0.9)),
    "spectral radius": ("strength", (0.001, 0.003, 0.01, 0.03)),
    "Entropy-SGD": ("gamma", (0.003, 0.03, 0.3, 3)),
    "Replicated-SGD": ("coupling", (0.001, 0.01, 0.1, 1)),
}
# What `--tune` chose.
TUNED = {
    "right labels": {
        PLAIN: 0.05,
        "plain, twice the epochs": 0.05,
        "InfoMCR": 10,
        "SAM": 0.2,
        "SAM, last 30 %": 0.5,
        "m-SAM": 0.05,
        "ASAM": 0.25,
        "noise": 0.005,
        "averaging": 0.9,
        "spectral radius": 0.003,
        "Entropy-SGD": 0.03,
        "Replicated-SGD": 1,
    },
    "10 % wrong labels": {
        PLAIN: 0.02,
        "plain, twice the epochs": 0.02,
        "InfoMCR": 1,
        "SAM": 0.2,
        "SAM, last 30 %": 0.5,
        "m-SAM": 0.2,
        "ASAM": 2,
        "noise": 0.05,
        "averaging": 0.25,
        "spectral radius": 0.03,
        "Entropy-SGD": 0.003,
        "Replicated-SGD": 1,
    },
}


def regularizer(method, value, rate):
    """Return the rule of a method, or `None`."""
    if method == "InfoMCR":
        return SubBatchPerturbation(alpha=1e-2, beta=value, num_sub_batches=4)
    if method in ("SAM", "SAM, last 30 %"):
        return SharpnessAware(rho=value)
    if method == "m-SAM":
        return SharpnessAware(rho=value, num_sub_batches=4)
    if method == "ASAM":
        return SharpnessAware(rho=value, adaptive=True)
    if method == "noise":
        return WeightNoise(std=value)
    if method == "spectral radius":
        return SpectralRadius(strength=value)
    if method == "Entropy-SGD":
        return EntropySGD(num_steps=INNER_STEPS, step_size=rate, gamma=value)
    return None


def callbacks(method, value, epochs, x_train):
    """Return the callbacks of a method."""
    if method == "InfoMCR":
        return [StartRegAfterLRDrop()]
    if method == "SAM, last 30 %":
        return [StartRegInLatePhase(last_fraction=0.3)]
    if method == "averaging":
        return [WeightAveraging(start=int(value * epochs), reestimate_with=x_train)]
    return []


def load_data(labels, seed):
    """Return training, validation and test data of a seed; the test data are those of any seed."""
    images, classes = digits(seed=0)
    generator = np.random.default_rng(seed)
    order = generator.permutation(NUM_POOL)
    x, y = images[order], classes[order]
    wrong = round(SHARES_WRONG[labels] * NUM_TRAIN)
    y[:wrong] = (y[:wrong] + generator.integers(1, 10, wrong)) % 10
    return {
        "training": (x[:NUM_TRAIN], y[:NUM_TRAIN]),
        "validation": (x[NUM_TRAIN:], y[NUM_TRAIN:]),
        "test": (images[NUM_POOL:], classes[NUM_POOL:]),
    }


def make_model(base=RegularizedModel):
    """Return the network, which gives logits, not compiled."""
    inputs = x = keras.Input((8, 8, 1))
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    return base(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))


def train(method, value, rate, epochs, seed, x, y):
    """Return a network trained by a method."""
    keras.utils.set_random_seed(seed)
    options = {}
    if method == "Replicated-SGD":
        model = ReplicatedModel(make_model(keras.Model), NUM_REPLICAS, coupling=value)
    else:
        model = make_model()
        options["regularizer"] = regularizer(method, value, rate)
    is_entropy_sgd = method == "Entropy-SGD"
    batch_size = BATCH_SIZE * (INNER_STEPS if is_entropy_sgd else 1)
    drop = max(1, epochs // 2) * NUM_TRAIN // batch_size
    first = 1.0 if is_entropy_sgd else rate  # Its outer steps go all the way to the chain's mean.
    # The rate of a step comes from its number, counted from 0.
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([drop - 1], [first, first / 5])
    momentum = {} if is_entropy_sgd else {"momentum": 0.9, "nesterov": True}
    model.compile(
        keras.optimizers.SGD(rates, **momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",  # elsewhere it takes longer than it saves
        **options,
    )
    found = callbacks(method, value, epochs, x)
    keras.utils.set_random_seed(seed)  # The order of the batches, whatever has drawn since.
    model.fit(x, y, batch_size=batch_size, epochs=epochs, callbacks=found, verbose=0)
    if method in ("Entropy-SGD", "Replicated-SGD"):  # whose statistics are of other weights
        reestimate_batch_norm(getattr(model, "centre", model), x)
    return model


def run(job):
    """Return a job, a dictionary, with what its network came to on its split."""
    start = time.process_time()
    data = load_data(job["labels"], job["seed"])
    of_job = [job[key] for key in ("method", "value", "rate", "epochs", "seed")]
    model = train(*of_job, *data["training"])
    seconds = time.process_time() - start
    loss, accuracy = model.evaluate(*data[job["split"]], batch_size=BATCH_SIZE, verbose=0)
    training = model.evaluate(*data["training"], batch_size=BATCH_SIZE, verbose=0)[1]
    keras.backend.clear_session()
    found = {"accuracy": accuracy, "loss": loss, "training_accuracy": training, "seconds": seconds}
    return job | found


def job(labels, method, value, rate, epochs, seed, split):
    """Return a job for `run`."""
    twice = method == "plain, twice the epochs"
    rate = value if method.startswith(PLAIN) else rate
    found = {"labels": labels, "method": method, "value": value, "rate": rate, "seed": seed}
    return found | {"epochs": epochs * (2 if twice else 1), "split": split}


def run_all(jobs, processes):
    """Return what `run` returns of each job, by so many processes of one thread each."""
    if processes == 1:
        return [run(job) for job in jobs]
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes that are started below
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        for row in pool.map(run, jobs):
            rows.append(row)
            words = "{labels}, {method} {value}, seed {seed}: {accuracy:.2%}".format(**row)
            print(f"{len(rows)}/{len(jobs)}  {words}", flush=True)
    return rows


def tune(epochs, processes, methods):
    """Return the best value of each method for right and for wrong labels, plain training first."""
    best = {labels: {PLAIN: TUNED[labels][PLAIN]} for labels in SHARES_WRONG}
    others = [method for method in methods if method != PLAIN]
    for some in [method for method in methods if method == PLAIN], others:
        trials = [
            (labels, method, value)
            for labels, method in itertools.product(SHARES_WRONG, some)
            for value in GRIDS[method][1]
        ]
        jobs = [
            job(*trial, best[trial[0]][PLAIN], epochs, seed, "validation")
            for trial, seed in itertools.product(trials, TUNING_SEEDS)
        ]
        rows = run_all(jobs, processes)
        for labels, method in itertools.product(SHARES_WRONG, some):
            best[labels][method] = best_value(rows, labels, method)
    return best


def best_value(rows, labels, method):
    """Return the value of the largest mean accuracy; of equals, that of the smallest mean loss."""

    def merit(value):
        of_value = {"labels": labels, "method": method, "value": value}
        chosen = [row for row in rows if of_value.items() <= row.items()]
        accuracy, loss = (np.mean([row[key] for row in chosen]) for key in ("accuracy", "loss"))
        print(f"{labels}, {method} {value}: accuracy {accuracy:.2%}, loss {loss:.3f}")
        return round(accuracy, 6), -loss

    return max(GRIDS[method][1], key=merit)


def compare(rows, labels, method):
    """Return the accuracies of a method and how they differ from plain training, in points.

    Returns:
        Dictionary with `"accuracies"` and `"differences"`, an entry a seed; of the differences
        their `"mean"`, the `"low"` and `"high"` end of its 95 % interval, and `"p"`.
    """

    def accuracies(name):
        chosen = [r for r in rows if r["labels"] == labels and r["method"] == name]
        return 100 * np.array([r["accuracy"] for r in sorted(chosen, key=lambda r: r["seed"])])

    differences = accuracies(method) - accuracies(PLAIN)
    mean, count = differences.mean(), len(differences)
    half = student_t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    numbers = {"mean": mean, "low": mean - half, "high": mean + half}
    arrays = {"accuracies": accuracies(method), "differences": differences}
    return arrays | numbers | {"p": sign_flip_p(differences)}


def sign_flip_p(differences):
    """Return the share of all flips of signs whose sum is at least as far from 0."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return np.mean(sums >= abs(differences.sum()) - 1e-9)  # equal sums may round differently


def verdict(found):
    """Return in a word what the interval of a difference says."""
    if found["low"] > 0:
        return "better"
    if found["high"] < 0:
        return "worse"
    return "alike" if max(-found["low"], found["high"]) <= MARGIN else "open"


def table(report):
    """Return the tables of a report, a string of Markdown."""
    rows = report["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"{len(seeds)} seeds, {report['epochs']} epochs ({report['versions']})"]
    for labels in SHARES_WRONG:
        lines += ["", f"**{labels}**", ""]
        lines += ["| method | setting | test accuracy | difference | 95 % interval | p | verdict |"]
        lines += ["|---|---|---:|---:|---:|---:|---|"]
        for method in methods_of(rows):
            name, _ = GRIDS[method]
            found = compare(rows, labels, method)
            [value] = {r["value"] for r in rows if (r["labels"], r["method"]) == (labels, method)}
            cells = [method, f"{name} {value:g}", f"{found['accuracies'].mean():.2f} %"]
            if method == PLAIN:
                cells += [""] * 4
            else:
                cells += [f"{found['mean']:+.2f}", f"{found['low']:+.2f} to {found['high']:+.2f}"]
                cells += [f"{found['p']:.3f}", verdict(found)]
            lines.append(f"| {' | '.join(cells)} |".replace("|  ", "| "))
    return "\n".join(lines) + "\n"


def write_docs(path, text):
    """Put the tables between their markers in a file."""
    begin, end = (f"<!-- compare_methods: {word} -->" for word in ("begin", "end"))
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")


def plot(rows, path):
    """Save a picture: a panel for each kind of labels, a line for each method."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    methods = [method for method in methods_of(rows) if method != PLAIN]
    for axis, labels in zip(axes, SHARES_WRONG):
        for height, method in enumerate(methods):
            found = compare(rows, labels, method)
            axis.plot(
                found["differences"], [height] * len(found["differences"]), "o", c="C0", alpha=0.25
            )
            reach = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            axis.errorbar(found["mean"], height, xerr=reach, fmt="D", c="C0", capsize=4)
        axis.axvline(0, color="gray", lw=1)
        plain = compare(rows, labels, PLAIN)["accuracies"].mean()
        axis.set_title(f"{labels}; plain training: {plain:.1f} %")
        axis.set_xlabel("test accuracy less that of plain training (percentage points)")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def methods_of(rows):
    """Return the methods that a report has rows of, in the order of the tables."""
    found = {row["method"] for row in rows}
    return [method for method in GRIDS if method in found]


def kept(path, methods):
    """Return the rows of an earlier report whose methods are not trained again."""
    if len(methods) == len(GRIDS) or not path.exists():
        return []
    return [r for r in json.loads(path.read_text())["rows"] if r["method"] not in methods]


def versions():
    """Return the backend, Keras and the machine, in words."""
    backend = keras.backend.backend()
    found = f"{backend} {importlib.import_module(backend).__version__}, Keras {keras.__version__}"
    return f"{found}, {os.cpu_count()} CPU cores"


def main():
    """Train all networks, print the tables, save the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "seeds, each of which trains a network by each method, at least 2 (%(default)s)"
    add("--seeds", type=positive, default=8, help=help)
    add("--epochs", type=positive, default=40, help="epochs of a run, at least 2 (%(default)s)")
    add("--processes", type=positive, default=2, help="runs at the same time (%(default)s)")
    help = "folder for the numbers and the picture (%(default)s)"
    add("--output", type=pathlib.Path, default="output", help=help)
    help = "try the values of every method on validation data, print the best, and train no more"
    add("--tune", action="store_true", help=help)
    help = "put the tables of the numbers in --output between their markers in a file, no training"
    add("--docs", type=pathlib.Path, help=help)
    help = "methods to train; --output keeps the numbers of all others (all)"
    add("--methods", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="NAME", help=help)
    options = parser.parse_args()
    if options.seeds < 2 or options.epochs < 2:
        parser.error(
            "--seeds and --epochs must be at least 2. "
            f"Received: --seeds {options.seeds} --epochs {options.epochs}"
        )
    path = options.output / "compare_methods.json"
    if PLAIN not in options.methods and not (path.exists() or options.tune):
        parser.error(
            f"--methods must hold {PLAIN!r}, which all others are compared with, where --output "
            f"has no numbers of it. Received: --methods {options.methods} --output {options.output}"
        )
    if options.docs:
        write_docs(options.docs, table(json.loads(path.read_text())))
        return
    if options.tune:
        print(json.dumps(tune(options.epochs, options.processes, options.methods), indent=4))
        return
    jobs = [
        job(labels, method, TUNED[labels][method], TUNED[labels][PLAIN], options.epochs, s, "test")
        for labels, method in itertools.product(SHARES_WRONG, options.methods)
        for s in range(options.seeds)
    ]
    rows = kept(path, options.methods) + run_all(jobs, options.processes)
    report = {"versions": versions(), "epochs": options.epochs, "rows": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, options.output / "compare_methods.png")
    print("", table(report), f"The numbers and the picture are in {options.output}", sep="\n")


if __name__ == "__main__":
    main()
