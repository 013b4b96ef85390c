"""Train one network twice, plainly and towards a flat minimum, and compare the minima.

The network is a small convolutional net on scikit-learn's handwritten digits (nothing is
downloaded). Both runs start from the same weights and see the same batches; the second one is
regularised after the learning rate has dropped, as in the InfoMCR paper. You will see a table
(test accuracy, training loss, gamma-hat: smaller is flatter) and a picture of the curves.

    python examples/quickstart.py

takes about a minute on two CPU cores.
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_digits

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.flatness import gamma_hat
from keras_infomcr.regularizers import SubBatchPerturbation

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_TRAIN = 1000
BATCH_SIZE = 100


def load_data(seed):
    """Return training and test images `[N, 8, 8, 1]`, pixels from -1 to 1, and labels `[N]`."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images = (images[order] / 8 - 1).reshape(-1, 8, 8, 1).astype("float32")
    labels = labels[order].astype("int32")
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


def train(regularizer, epochs, seed, train_data, test_data):
    """Train the network; return it, its history and the seconds that it took."""
    keras.utils.set_random_seed(seed)
    model = make_model()
    drop_step = drop_epoch(epochs) * NUM_TRAIN // BATCH_SIZE - 1
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([drop_step], [0.1, 0.02])
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        regularizer=regularizer,
    )
    # Normalised, as the paper has it where it compares runs with and without the regulariser.
    callbacks = [GammaHatCallback(train_data, normalize_softmax=True)]
    if regularizer is not None:
        callbacks.append(StartRegAfterLRDrop(verbose=1))
    start = time.perf_counter()
    history = model.fit(
        *train_data,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test_data,
        callbacks=callbacks,
    )
    return model, history.history, time.perf_counter() - start


def drop_epoch(epochs):
    """Return the epoch, from 0, that begins with the lower learning rate."""
    return max(1, epochs // 4)


def table_row(name, model, history, seconds, train_data, test_data):
    """Return one line of the table."""
    _, accuracy = model.evaluate(*test_data, verbose=0)
    loss, _ = model.evaluate(*train_data, verbose=0)
    plain, normalized = (
        gamma_hat(model, *train_data, num_trials=10, normalize_softmax=n, seed=0)
        for n in (False, True)
    )
    return (
        f"{name:<12} {accuracy:>13.2%} {loss:>14.5f} {plain.value:>11.1f} +- {plain.stderr:<5.1f}"
        f" {normalized.value:>11.1f} +- {normalized.stderr:<5.1f} {seconds:>7.0f}"
    )


def plot(histories, epochs, path):
    """Save a picture of the curves, with the drop of the learning rate marked."""
    panels = {
        "Training loss": "loss",
        "Test accuracy": "val_accuracy",
        "gamma-hat, normalised (smaller is flatter)": "gamma_hat",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (title, key) in zip(axes, panels.items()):
        for (name, history), style in zip(histories.items(), ("--", "-")):
            axis.plot(np.arange(1, epochs + 1), history[key], style, label=name)
        axis.axvline(drop_epoch(epochs) + 0.5, color="gray", lw=1, ls=":", label="rate drops")
        axis.set(title=title, xlabel="epoch")
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0.9)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    """Run both trainings, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("output"), help="folder (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error(f"--epochs must be at least 2. Received: --epochs {arguments.epochs}")
    arguments.output.mkdir(parents=True, exist_ok=True)

    train_data, test_data = load_data(arguments.seed)
    # Digits are learned within a few epochs, which leaves small gradients: a regulariser with
    # the paper's settings for CIFAR, 1e-4 and 10, would hardly act.
    rules = {"plain": None, "regularised": SubBatchPerturbation(alpha=1e-2, beta=100.0)}
    histories, rows = {}, []
    for name, regularizer in rules.items():
        print(f"\n{name}")
        model, histories[name], seconds = train(
            regularizer, arguments.epochs, arguments.seed, train_data, test_data
        )
        rows.append(table_row(name, model, histories[name], seconds, train_data, test_data))

    print(
        f"\n{'':<12} {'test accuracy':>13} {'training loss':>14} {'gamma-hat':>20}"
        f" {'normalised':>20} {'seconds':>7}"
    )
    print("\n".join(rows))
    picture = arguments.output / "quickstart.png"
    plot(histories, arguments.epochs, picture)
    print(f"\nThe curves are in {picture}")


if __name__ == "__main__":
    main()
