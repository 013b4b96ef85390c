"""Train one network twice, plainly and towards a flat minimum, and compare the minima.

The network is a small convolutional net, trained on 500 of scikit-learn's handwritten digits, a
fifth of them with a wrong label (nothing is downloaded). Both runs start from the same weights and
see the same batches for as many epochs; the second one is regularised after the learning rate has
dropped, as in the InfoMCR paper. You will see a table (test accuracy, losses, gamma-hat: smaller
is flatter), the same comparison over eight seeds, as benchmarks/quickstart_seeds.py made it
before, and a picture of both.

    python examples/quickstart.py

takes half a minute on two CPU cores.
"""

import argparse
import json
import pathlib
import time

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_digits

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_TRAIN = 500
NUM_WRONG = 100
BATCH_SIZE = 100
EPOCHS = 40
# The paper's settings but for alpha, which is 1e-4 there: so small a network needs more of it.
RUNS = {"plain": None, "regularised": {"alpha": 1e-2, "beta": 10.0, "num_sub_batches": 8}}

# What the runs are judged by: a name, a format, and whether smaller (-1) or larger (1) is better.
MEASURES = {
    "test_accuracy": ("test accuracy", ".2%", 1),
    "test_loss": ("test loss", ".3f", -1),
    "gamma_hat": ("gamma-hat, normalised", ".0f", -1),
    "best_test_accuracy": ("test accuracy of the best epoch", ".2%", 1),
    "training_loss": ("training loss, wrong labels included", ".3f", 0),
}
GAMMA_HAT = "Normalised gamma-hat: smaller is flatter"


def load_data(seed):
    """Return training and test images `[N, 8, 8, 1]`, pixels from -1 to 1, and labels `[N]`."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    images = (images[order] / 8 - 1).reshape(-1, 8, 8, 1).astype("float32")
    labels = labels[order].astype("int32")
    # The order is random, so that the first examples are as good as any.
    labels[:NUM_WRONG] = (labels[:NUM_WRONG] + generator.integers(1, 10, NUM_WRONG)) % 10
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])


def make_model():
    """Return a network of two convolutions and 6,154 trainable weights that gives logits."""
    inputs = keras.Input((8, 8, 1))
    x = inputs
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(x))
    return RegularizedModel(inputs, outputs)


def drop_epoch(epochs):
    """Return the epoch, from 0, that begins with the lower learning rate."""
    return max(1, epochs // 4)


def train(name, epochs, seed, verbose="auto"):
    """Train the network as one of the `RUNS`; return its history and what it is judged by."""
    train_data, test_data = load_data(seed)
    keras.utils.set_random_seed(seed)
    model = make_model()
    drop_step = drop_epoch(epochs) * NUM_TRAIN // BATCH_SIZE - 1
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([drop_step], [0.1, 0.02])
    options = RUNS[name]
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        regularizer=options and SubBatchPerturbation(**options),
    )
    # Normalised, as the paper has it where it compares runs with and without the regulariser; over
    # five trials of a hundred, so that each training digit is measured once.
    callbacks = [GammaHatCallback(train_data, num_trials=5, normalize_softmax=True)]
    if options:
        callbacks.append(StartRegAfterLRDrop(verbose=int(verbose != 0)))
    start = time.perf_counter()
    history = model.fit(
        *train_data,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test_data,
        callbacks=callbacks,
        verbose=verbose,
    ).history
    seconds = time.perf_counter() - start
    return history, {
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_loss"][-1],
        "gamma_hat": history["gamma_hat"][-1],
        "best_test_accuracy": max(history["val_accuracy"]),
        "training_loss": model.evaluate(*train_data, verbose=0)[0],
        "seconds": seconds,
    }


def table(runs):
    """Return the lines of the table of one seed."""
    header = f"{'':<37}" + "".join(f"{name:>13}" for name in runs)
    rows = {key: (label, form) for key, (label, form, _) in MEASURES.items()}
    rows["seconds"] = "seconds", ".0f"
    return [header] + [
        f"{label:<37}" + "".join(f"{format(run[key], form):>13}" for run in runs.values())
        for key, (label, form) in rows.items()
    ]


def comparison(report):
    """Return the lines of the table over the seeds of a report."""
    rows = report["rows"]
    lines = [
        f"{len(rows)} seeds, {rows[0]['seed']} to {rows[-1]['seed']}, of {report['epochs']} epochs "
        f"({report['versions']}); mean +- standard deviation:",
        f"{'':<37}{'plain':>18}{'regularised':>18}{'difference':>18}{'better':>8}",
    ]
    for key, (label, form, sign) in MEASURES.items():
        plain, regularised = (np.array([row[name][key] for row in rows]) for name in RUNS)
        differences = regularised - plain
        cells = [
            f"{values.mean():{form}} +- {values.std(ddof=1):{form}}"
            for values in (plain, regularised)
        ]
        cells.append(f"{differences.mean():+{form}} +- {differences.std(ddof=1):{form}}")
        better = f"{np.sum(sign * differences > 0)} of {len(rows)}" if sign else ""
        lines.append(f"{label:<37}" + "".join(f"{cell:>18}" for cell in cells) + f"{better:>8}")
    return lines


def load_report():
    """Return what benchmarks/quickstart_seeds.py found, on this backend or else on TensorFlow."""
    folder = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    names = (f"quickstart_seeds_{b}_cpu.json" for b in (keras.backend.backend(), "tensorflow"))
    path = next(folder / name for name in names if (folder / name).exists())
    return json.loads(path.read_text())


def plot(histories, epochs, report, path):
    """Save a picture of the curves and, below, of each of the seeds of the report."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    panels = {"Training loss": "loss", "Test accuracy": "val_accuracy", GAMMA_HAT: "gamma_hat"}
    for axis, (title, key) in zip(axes[0], panels.items()):
        for (name, history), style in zip(histories.items(), ("--", "-")):
            axis.plot(np.arange(1, epochs + 1), history[key], style, label=name)
        label = "rate drops, regulariser starts"
        axis.axvline(drop_epoch(epochs) + 0.5, color="gray", lw=1, ls=":", label=label)
        axis.set(title=title, xlabel="epoch")
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_ylim(bottom=0.7)
    axes[0, 0].legend()
    plot_seeds(axes[1], report["rows"])
    figure.savefig(path, dpi=120)


def plot_seeds(axes, rows):
    """Draw what the two runs of each seed came to, joined by a line."""
    seeds = [row["seed"] for row in rows]
    panels = {"Test loss": "test_loss", "Test accuracy": "test_accuracy", GAMMA_HAT: "gamma_hat"}
    for axis, (title, key) in zip(axes, panels.items()):
        pairs = [[row[name][key] for row in rows] for name in RUNS]
        axis.vlines(seeds, *pairs, color="gray", lw=1)
        for values, marker in zip(pairs, "os"):
            axis.plot(seeds, values, marker)
        axis.set(title=title, xlabel="seed", xticks=seeds)


def main():
    """Run both trainings, print the tables, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="epochs of each run (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("output"), help="folder (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error(f"--epochs must be at least 2. Received: --epochs {arguments.epochs}")
    arguments.output.mkdir(parents=True, exist_ok=True)

    histories, runs = {}, {}
    for name in RUNS:
        print(f"\n{name}")
        histories[name], runs[name] = train(name, arguments.epochs, arguments.seed)
    print("", f"Seed {arguments.seed}:", *table(runs), sep="\n")
    report = load_report()
    print("", *comparison(report), sep="\n")
    picture = arguments.output / "quickstart.png"
    plot(histories, arguments.epochs, report, picture)
    print(f"\nThe curves are in {picture}")


if __name__ == "__main__":
    main()
