"""Train one network in many ways, and see which measures of flatness foretell the test error.

The network is a small perceptron on scikit-learn's handwritten digits (nothing is downloaded). It
is trained to almost no training loss with small and with large batches, with and without shifted
images, from several seeds; then each minimum is measured on the training images as they are. You
will see a table of rank correlations (Kendall's tau, between -1 and 1) of each measure with the
test error, what they say in words, and a picture. The question is that of the InfoMCR paper,
Sec. 7.1, and of Jiang et al., "Fantastic Generalization Measures and Where to Find Them", ICLR
2020 (https://arxiv.org/abs/1912.02178).

    python examples/compare_minima.py

takes some five minutes on two CPU cores; with `--epochs 20 --seeds 2` about one.
"""

import argparse
import itertools
import json
import math
import pathlib
import textwrap

import keras
import matplotlib
import numpy as np
from images import digits
from options import positive, use_true_float32
from scipy.stats import kendalltau

from keras_infomcr import flatness

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

NUM_TRAIN = 600
BATCH_SIZES = {"small": 20, "large": 300}
TRACKS = 0.3  # The tau from which on a measure is said to track the test error.
# (batches, whether images are shifted) and the colour in the picture.
SETTINGS = {
    ("small", False): "tab:blue",
    ("large", False): "tab:cyan",
    ("small", True): "tab:red",
    ("large", True): "tab:orange",
}

FEW = {"num_trials": 6, "seed": 0}  # Six trials of 100 examples see each training image once.
ALL = {"chunk_size": NUM_TRAIN, "seed": 0}
MEASURES = {
    "gamma_hat": lambda *a: flatness.gamma_hat(*a, **FEW).value,
    "gamma_hat (normalised)": lambda *a: (
        flatness.gamma_hat(*a, normalize_softmax=True, **FEW).value
    ),
    "hessian_trace": lambda *a: flatness.hessian_trace(*a, **ALL).value,
    "hessian_frobenius_norm": lambda *a: flatness.hessian_frobenius_norm(*a, **ALL).value,
    "hessian_spectral_radius": lambda *a: flatness.hessian_spectral_radius(*a, **ALL).value,
    "relative_flatness": lambda *a: flatness.relative_flatness(*a, **ALL).value,
    "fisher_trace": lambda *a: flatness.fisher_trace(*a, **FEW).value,
    "fisher_frobenius_norm": lambda *a: flatness.fisher_frobenius_norm(*a, **FEW).value,
    "fisher_spectral_radius": lambda *a: flatness.fisher_spectral_radius(*a, **FEW).value,
    "fisher_rao_norm": lambda *a: flatness.fisher_rao_norm(*a, **ALL).value,
    "input_jacobian_norm": lambda *a: flatness.input_jacobian_norm(*a, **ALL).value,
    "adaptive_sharpness": lambda *a: flatness.adaptive_sharpness(*a, **ALL).value,
    "average_adaptive_sharpness": lambda *a: (
        flatness.average_adaptive_sharpness(*a, rho=0.1, **ALL).value
    ),
    # The weaker noise of the default leaves most of these networks without an error.
    "local_energy": lambda *a: flatness.local_energy(*a, sigma=0.5, **ALL).error,
    # Larger is flatter: with the minus all measures are smaller where it is flatter.
    "-local_entropy": lambda *a: -flatness.local_entropy(*a, **ALL).value,
    "local_entropy_gradient_norm": lambda *a: flatness.local_entropy_gradient_norm(*a, **ALL).value,
}
BASELINE = "training loss"


def load_data():
    """Return training and test images `[N, 8, 8, 1]`, pixels from -1 to 1, and labels `[N]`."""
    images, labels = digits(seed=0)
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])


def shifted(images, generator):
    """Return the images, each as it was or moved by a pixel: up, down, left or right."""
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-1)
    corners = np.array([(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)])[
        generator.integers(0, 5, len(images))
    ]
    return np.stack([image[i : i + 8, j : j + 8] for image, (i, j) in zip(padded, corners)])


def make_model():
    """Return a network of two hidden layers that gives logits, not compiled."""
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(inputs)
    for _ in range(2):
        x = keras.layers.Dense(256, use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def train(batch_size, shifts, seed, epochs, images, labels):
    """Return a trained network. One seed gives the same start and order of images everywhere."""
    keras.utils.set_random_seed(seed)
    model = make_model()
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.1, epochs * NUM_TRAIN // batch_size),
            momentum=0.9,
            nesterov=True,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # XLA, which JAX cannot do without, takes longer to compile this than to train it.
        jit_compile=keras.backend.backend() == "jax",
    )
    # All epochs, drawn beforehand, are one long epoch for `fit`.
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(NUM_TRAIN) for _ in range(epochs)])
    seen = shifted(images[order], generator) if shifts else images[order]
    model.fit(seen, labels[order], batch_size=batch_size, shuffle=False, verbose=0)
    return model


def examine(model, train_data, test_data):
    """Return the loss, the accuracy, the test error and the measures of a network."""
    loss, accuracy = model.evaluate(*train_data, batch_size=NUM_TRAIN, verbose=0)
    _, test_accuracy = model.evaluate(*test_data, batch_size=NUM_TRAIN, verbose=0)
    measures = {name: float(measure(model, *train_data)) for name, measure in MEASURES.items()}
    return {
        "train_accuracy": accuracy,
        "test_error": 1 - test_accuracy,
        "measures": {BASELINE: loss, **measures},
    }


def train_and_examine(epochs, num_seeds):
    """Return what `examine` finds of each network, with what it was trained with."""
    train_data, test_data = load_data()
    print("batch  shifts  seed  training loss  training accuracy  test error")
    models = []
    for (size, shifts), seed in itertools.product(SETTINGS, range(num_seeds)):
        model = train(BATCH_SIZES[size], shifts, seed, epochs, *train_data)
        found = examine(model, train_data, test_data)
        print(
            f"{size:<5}  {'yes' if shifts else 'no':<6}  {seed:>4}"
            f"  {found['measures'][BASELINE]:>13.6f}  {found['train_accuracy']:>17.2%}"
            f"  {found['test_error']:>10.2%}",
            flush=True,
        )
        models.append({"batch size": size, "shifts": shifts, "seed": seed, **found})
    return models


def column(models, name):
    """Return a measure, or the test error, of all networks."""
    return [m[name] if name == "test_error" else m["measures"][name] for m in models]


def tau_between(models, name, factor):
    """Return tau over the pairs that one factor sets apart, their seeds aside.

    It is the share of pairs in which the flatter network has the smaller test error, less the
    share of those in which it has the larger. Pairs of the same test error do not count.
    """
    fixed = {"batch size", "shifts"} - {factor}
    signs = [
        np.sign(a["measures"][name] - b["measures"][name])
        * np.sign(a["test_error"] - b["test_error"])
        for a, b in itertools.combinations(models, 2)
        if a[factor] != b[factor]
        and all(a[f] == b[f] for f in fixed)
        and a["test_error"] != b["test_error"]
    ]
    return float(np.mean(signs)) if signs else math.nan


def correlations(models):
    """Return the taus of each measure: over all networks, between settings, with the loss."""
    errors, losses = column(models, "test_error"), column(models, BASELINE)
    return {
        name: {
            "all": float(kendalltau(column(models, name), errors).statistic),
            **{f: tau_between(models, name, f) for f in ("batch size", "shifts", "seed")},
            "with loss": float(kendalltau(column(models, name), losses).statistic),
        }
        for name in models[0]["measures"]
    }


def table(taus):
    """Return the lines of the table of correlations."""
    columns = list(taus[BASELINE])
    header = f"{'tau with the test error':<28}" + "".join(f"{c:>12}" for c in columns)
    return [header] + [
        f"{name:<28}" + "".join(f"{row[c]:>+12.2f}" for c in columns) for name, row in taus.items()
    ]


def statement(taus, num_models):
    """Return, in words, which measures track the test error and which fail."""
    where = {
        "all": f"Over all {num_models} networks",
        "batch size": "Between small and large batches",
        "shifts": "Between training with and without shifts",
        "seed": "Between seeds, all else equal",
    }
    baseline = taus[BASELINE]
    better = [k for k, row in taus.items() if row["all"] > baseline["all"] + 0.05]
    followers = [k for k, row in taus.items() if k != BASELINE and row["with loss"] > 0.7]
    # Two standard deviations of the tau of independent numbers.
    chance = 2 * math.sqrt(2 * (2 * num_models + 5) / (9 * num_models * (num_models - 1)))
    return [
        *(f"{words}: {verdicts(taus, c)}." for c, words in where.items()),
        f"The training loss, no measure of flatness, has tau {baseline['all']:+.2f} over all; "
        f"better by more than 0.05: {listed(better, taus)}.",
        f"Mostly the level of the training loss (tau with it above 0.7) is what these see: "
        f"{listed(followers, taus)}.",
        f"Chance alone gives one measure in twenty |tau| > {chance:.2f} over all networks.",
    ]


def verdicts(taus, column):
    """Return, in words, what a column of the table says of each measure."""
    groups = {f"track the test error (tau > {TRACKS})": [], "fail": [], "point the wrong way": []}
    track, fail, wrong = groups.values()
    for name, row in taus.items():
        (track if row[column] > TRACKS else wrong if row[column] < -TRACKS else fail).append(name)
    return "; ".join(f"{listed(n, taus)} {verb}" for verb, n in groups.items() if n)


def listed(names, taus):
    """Return names with commas between them."""
    if len(names) == len(taus):
        return "all measures, the training loss among them,"
    return ", ".join(names) or "none"


def plot(models, taus, path):
    """Save a picture with a panel for each measure, the test error above it."""
    num_rows = math.ceil(len(taus) / 6)
    size = 17, 1 + 2.7 * num_rows
    figure, axes = plt.subplots(num_rows, 6, figsize=size, sharey=True, layout="constrained")
    for axis, (name, row) in zip(axes.flat, taus.items()):
        for (size, shifts), color in SETTINGS.items():
            group = [m for m in models if (m["batch size"], m["shifts"]) == (size, shifts)]
            errors = 100 * np.array(column(group, "test_error"))
            label = f"{size} batches, {'with' if shifts else 'no'} shifts"
            axis.scatter(column(group, name), errors, color=color, label=label)
        set_scale(axis, column(models, name))
        axis.set_title(f"{name}\ntau {row['all']:+.2f}", fontsize="medium")
    for axis in axes.flat[len(taus) :]:
        axis.set_axis_off()
    figure.supxlabel("measure (left is flatter)")
    figure.supylabel("test error, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=100)


def set_scale(axis, values):
    """Choose a scale of the measure on which a few labels say enough, and do not overlap."""
    if min(values) > 0 and max(values) > 100 * min(values):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axis.locator_params(axis="x", nbins=4)
        axis.ticklabel_format(axis="x", scilimits=(-2, 3))


def main():
    """Train and measure all networks, print the table and what it says, save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "passes of each network over its training images (%(default)s)"
    add("--epochs", type=positive, default=100, help=help)
    help = "networks trained in each of the four ways, from different seeds (%(default)s)"
    add("--seeds", type=positive, default=5, help=help)
    help = "folder for the numbers and the picture (%(default)s)"
    add("--output", type=pathlib.Path, default="output", help=help)
    arguments = parser.parse_args()
    use_true_float32()
    arguments.output.mkdir(parents=True, exist_ok=True)
    models = train_and_examine(arguments.epochs, arguments.seeds)
    taus = correlations(models)
    sentences = [textwrap.fill(s, 100) for s in statement(taus, len(models))]
    print("", *table(taus), "", *sentences, sep="\n")
    numbers = json.dumps({"models": models, "tau": taus}, indent=2)
    (arguments.output / "compare_minima.json").write_text(numbers)
    plot(models, taus, arguments.output / "compare_minima.png")
    print(f"\nThe numbers and the picture are in {arguments.output}/compare_minima.json and .png")


if __name__ == "__main__":
    main()
