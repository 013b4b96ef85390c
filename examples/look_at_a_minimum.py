"""Look at two minima: train a network plainly and with SAM, and draw both on one page.

The network is a perceptron on 500 of scikit-learn's handwritten digits, a fifth of which have a
wrong label (nothing is downloaded). It is trained twice from the same weights, by steps of gradient
descent on all 500 images together: plainly, and by sharpness-aware minimisation (SAM). You will see
a short table, and a page of nine pictures in look_at_a_minimum.png.

    python examples/look_at_a_minimum.py

takes half a minute on two CPU cores. What the page shows, and how to read it:

* Sharpness in training. The first eigenvalue of the Hessian is the curvature of the loss along its
  steepest direction. Gradient descent diverges where the curvature stays above 2/lr, the dashed
  line. Training sharpens the loss until the curvature gets there, and then hovers about the line,
  at the edge of stability (Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at
  the Edge of Stability", ICLR 2021, https://arxiv.org/abs/2103.00065). Towards the end the
  curvature falls with the loss. SAM's line lies lower, the lower the smaller the gradient is, and
  SAM stays close to it: expect it to end at less than half of the curvature.
* The line between the two networks. Where the loss rises above the dashed chord there is a barrier:
  the mean of the two networks has a larger loss than their losses have as a mean. Networks of two
  seeds have a barrier as a rule; here both start at the same weights.
* A slice of the loss, along two random directions through the weights, the same for both networks
  but that each filter of a direction is as long as the network's own. Read the numbers on the
  lines.
* The trace of the Hessian by the weights of each layer: where the network is sharp.
* The spectrum of the Hessian, before the first step and at four times in training. Nearly all of
  the thousands of eigenvalues are next to zero; the few on the right are the sharp directions.

A slice is an illustration, and no measure: it shows two of thousands of directions, and another
seed shows others. Nor do two networks compare two methods: `compare_methods.py` does that, on many
seeds.
"""

import argparse
import pathlib

import keras
import matplotlib
import numpy as np
from images import digits
from options import positive, use_true_float32

from keras_infomcr import RegularizedModel, callbacks, flatness
from keras_infomcr.regularizers import SharpnessAware

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_TRAIN, NUM_WRONG = 500, 100
LEARNING_RATE = 0.2
REGULARIZERS = {"gradient descent": lambda: None, "SAM": lambda: SharpnessAware(rho=0.1)}
NUM_EPOCHS = 4  # Parts of training, with a spectrum at the end of each.
ALL = {"chunk_size": NUM_TRAIN, "seed": 0}


def load_data():
    """Return training and test images `[N, 64]`, pixels from -1 to 1, and labels `[N]`."""
    generator = np.random.default_rng(0)
    images, labels = digits(generator)
    images = images.reshape(len(images), 64)
    labels[:NUM_WRONG] = (labels[:NUM_WRONG] + generator.integers(1, 10, NUM_WRONG)) % 10
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])


def make_model():
    """Return a perceptron of three hidden layers that gives logits, not compiled."""
    inputs = x = keras.Input((64,))
    for k, units in enumerate((64, 48, 32)):
        x = keras.layers.Dense(units, "tanh", name=f"hidden_{k + 1}")(x)
    return RegularizedModel(inputs, keras.layers.Dense(10, name="logits")(x))


class Spectra(keras.callbacks.Callback):
    """Collects the spectral density of the Hessian, before training and after each epoch."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        self.found = []

    def on_train_begin(self, logs=None):
        """Measure the initial weights."""
        self.on_epoch_end(-1)

    def on_epoch_end(self, epoch, logs=None):
        """Measure the weights as they are."""
        self.found.append(flatness.hessian_spectral_density(self.model, *self.data, **ALL))


def train(regularizer, data, steps, seed):
    """Return a trained network, its sharpness over the steps, and its spectra by step."""
    keras.utils.set_random_seed(seed)  # fixes the initial weights
    model = make_model()
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        regularizer=regularizer,
    )
    sharpness = callbacks.SharpnessCallback(
        data, frequency=max(1, steps // 100), unit="step", num_examples=None, **ALL
    )
    spectra = Spectra(data)
    # Images that are repeated give an epoch of several steps, each on all of them.
    repeats = max(1, steps // NUM_EPOCHS)
    repeated = [np.concatenate([array] * repeats) for array in data]
    settings = {"batch_size": NUM_TRAIN, "epochs": NUM_EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(*repeated, callbacks=[sharpness, spectra], **settings)
    return model, sharpness.record, {repeats * k: s for k, s in enumerate(spectra.found)}


def examine(model, train_data, test_data, num_points):
    """Return what the table and the page show of a trained network."""
    loss, _ = model.evaluate(*train_data, batch_size=NUM_TRAIN, verbose=0)
    _, accuracy = model.evaluate(*test_data, batch_size=NUM_TRAIN, verbose=0)
    by_layer = flatness.hessian_trace_by_layer(model, *train_data, **ALL)
    top = flatness.hessian_top_eigenvalues(model, *train_data, num_eigenvalues=2, **ALL)
    return {
        "training loss": loss,
        "test accuracy": accuracy,
        "largest eigenvalue": top.value,
        "trace of the Hessian": float(by_layer.values.sum()),
        "by layer": by_layer,
        "surface": flatness.loss_surface(model, *train_data, num_points=num_points, **ALL),
    }


def table(found):
    """Return the lines of a table of the two networks."""
    rows = ("training loss", "test accuracy", "largest eigenvalue", "trace of the Hessian")
    lines = ["".join([f"{'':<22}", *(f"{name:>18}" for name in found)])]
    for row in rows:
        lines.append("".join([f"{row:<22}", *(f"{f[row]:>18.4g}" for f in found.values())]))
    return lines


def draw(runs, found, between):
    """Return the page, a figure: a column for each network, and one for what is left."""
    figure, axes = plt.subplots(3, 3, figsize=(11, 9.8), layout="constrained")
    # One scale for both networks.
    axes[0, 1].sharey(axes[0, 0])
    axes[2, 1].sharex(axes[2, 0])
    axes[2, 2].sharex(axes[1, 2])
    for name, column in zip(runs, axes.T):
        _, record, spectra = runs[name]
        flatness.plot.sharpness(record, axes=column[0]).set_title(f"{name}: sharpness in training")
        slice_axes = flatness.plot.loss_surface(found[name]["surface"], axes=column[1])
        slice_axes.set_title(f"{name}: {slice_axes.get_title()}".replace(", ", "\n", 1))
        rows = flatness.plot.spectral_density([*spectra.values()], column[2], labels=spectra)
        rows.set_title(f"{name}: spectrum by step")
    for name, bars in zip(runs, axes[1:, 2]):
        flatness.plot.by_layer(found[name]["by layer"], axes=bars).set_title(f"{name}: layers")
        bars.tick_params(labelsize="medium")
    line = flatness.plot.loss_between(between, axes=axes[0, 2])
    line.set_title(f"the line between them: {line.get_title()}")
    first, second = runs
    line.set_xlabel(f"from {first} (0) to {second} (1)")
    return figure


def main():
    """Train both networks, print the table, draw the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=positive, default=1000, help="steps of each training (%(default)s)")
    help = "points of each direction of a slice (%(default)s)"
    add("--points", type=positive, default=25, help=help)
    add("--seed", type=int, default=0, help="seed of the initial weights (%(default)s)")
    help = "folder for the picture (%(default)s)"
    add("--output", type=pathlib.Path, default="output", help=help)
    arguments = parser.parse_args()
    use_true_float32()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_data, test_data = load_data()
    runs, found = {}, {}
    for name, regularizer in REGULARIZERS.items():
        runs[name] = train(regularizer(), train_data, arguments.steps, arguments.seed)
        found[name] = examine(runs[name][0], train_data, test_data, arguments.points)
    between = flatness.loss_between(*(model for model, *_ in runs.values()), *train_data, **ALL)
    print(*table(found), f"barrier between the two: {between.barrier:.3g}", sep="\n")
    path = arguments.output / "look_at_a_minimum.png"
    draw(runs, found, between).savefig(path, dpi=115)
    print(f"\nThe page is in {path}")


if __name__ == "__main__":
    main()
