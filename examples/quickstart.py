"""
Title: Flat minima on handwritten digits
Author: The authors of keras_infomcr
Date created: 2026/11/21
Last modified: 2026/11/27
Description: Train one network twice, plainly and towards a flat minimum, and compare the minima.
Accelerator: None
"""
# ruff: noqa: D103, D415, E402 - text and code take turns, as in the tutorials of keras.io

"""
## Introduction

A minimum of the training loss is flat if the loss rises little around it. Jia and Su
(["Information-Theoretic Local Minima Characterization and
Regularization"](https://arxiv.org/abs/1911.08192), ICML 2020) measure by a number, gamma-hat, how
flat a minimum is, and propose a regulariser that leads training to flatter minima. This example
uses both, inside `model.fit`.

We train a small convolutional network on 500 of scikit-learn's handwritten digits, a fifth of which
have a wrong label. A network that is trained for long learns the wrong labels by heart, and errs
more on digits that it has not seen. We shall train twice, from the same weights and on the same
batches, and change nothing but the regulariser.

You will see a table that compares the two runs, and a picture in `output/quickstart.png`. Run

```
python examples/quickstart.py
```

It takes half a minute on two CPU cores, and downloads nothing.
"""

"""
## Setup

Keras runs on TensorFlow, JAX or torch: set the environment variable `KERAS_BACKEND`, for instance
to `jax`, to choose one. Three more environment variables, which you may leave unset, change this
example: the seed from which everything is drawn, the number of epochs (at least 2), and the folder
that takes the picture.
"""

import json
import os
import pathlib
import time

import keras
import matplotlib

matplotlib.use("Agg")  # draw into a file, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
from images import digits

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

seed = int(os.environ.get("QUICKSTART_SEED", 0))
num_epochs = int(os.environ.get("QUICKSTART_EPOCHS", 40))
output = pathlib.Path(os.environ.get("QUICKSTART_OUTPUT", "output"))

"""
## Data

There are 1,797 images of 8 x 8 pixels, which `digits` shuffles. We train on 500 of them. The labels
of the first 100 are made wrong: a number from 1 to 9 is added to each, modulo 10. We test on all
other images, whose labels are right.
"""

num_train, num_wrong, batch_size = 500, 100, 100
generator = np.random.default_rng(seed)
images, labels = digits(generator)
labels[:num_wrong] = (labels[:num_wrong] + generator.integers(1, 10, num_wrong)) % 10
x_train, y_train = images[:num_train], labels[:num_train]
x_test, y_test = images[num_train:], labels[num_train:]

"""
## Model

A `RegularizedModel` is a `keras.Model` in all but its training step. It is made like one: here from
inputs and outputs, but you may also derive a class from it, or turn any model into one by
`RegularizedModel.from_model(model)`. Our network has two convolutions and 6,154 trainable weights,
and returns logits.
"""


def make_model():
    inputs = x = keras.Input((8, 8, 1))
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    return RegularizedModel(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))


"""
Both runs lower the learning rate to a fifth after a quarter of their epochs. (The rate of a step
comes from its number, counted from 0.)
"""

drop_epoch = max(1, num_epochs // 4)
last_step = drop_epoch * num_train // batch_size - 1
learning_rate = keras.optimizers.schedules.PiecewiseConstantDecay([last_step], [0.1, 0.02])

"""
## Train

First the plain run: without a regulariser a `RegularizedModel` trains exactly as a `keras.Model`
does. `GammaHatCallback` measures gamma-hat after each epoch and adds it to the logs. With
`normalize_softmax=True` gamma-hat does not depend on how large the logits have become, and the
paper compares runs with and without the regulariser in this form. Five trials of 100 examples use
every training image once.
"""

keras.utils.set_random_seed(seed)  # fixes the initial weights and the order of the batches
plain = make_model()
plain.compile(
    keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    regularizer=None,
)
start = time.perf_counter()
plain_history = plain.fit(
    x_train,
    y_train,
    batch_size=batch_size,
    epochs=num_epochs,
    validation_data=(x_test, y_test),
    callbacks=[GammaHatCallback((x_train, y_train), num_trials=5, normalize_softmax=True)],
    verbose=2,
).history
plain_seconds = time.perf_counter() - start

"""
The second run differs in two lines. `SubBatchPerturbation` is the paper's regulariser, with the
paper's settings but for `alpha`, which is 1e-4 there: so small a network needs more of it.
`StartRegAfterLRDrop` enables it once the learning rate has dropped, as the paper does.
"""

keras.utils.set_random_seed(seed)
regularised = make_model()
regularised.compile(
    keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    regularizer=SubBatchPerturbation(alpha=1e-2, beta=10.0, num_sub_batches=8),
)
start = time.perf_counter()
regularised_history = regularised.fit(
    x_train,
    y_train,
    batch_size=batch_size,
    epochs=num_epochs,
    validation_data=(x_test, y_test),
    callbacks=[
        GammaHatCallback((x_train, y_train), num_trials=5, normalize_softmax=True),
        StartRegAfterLRDrop(verbose=1),
    ],
    verbose=2,
).history
regularised_seconds = time.perf_counter() - start

"""
## Measure

Smaller gamma-hat is flatter. The training loss counts the wrong labels too, so that a run which
learns fewer of them by heart has more of it.
"""

runs = {}
for name, model, history, seconds in (
    ("plain", plain, plain_history, plain_seconds),
    ("regularised", regularised, regularised_history, regularised_seconds),
):
    runs[name] = {
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_loss"][-1],
        "gamma_hat": history["gamma_hat"][-1],
        "best_test_accuracy": max(history["val_accuracy"]),
        "training_loss": model.evaluate(x_train, y_train, verbose=0)[0],
        "seconds": seconds,
    }

print(f"\nSeed {seed}:{'plain':>42}{'regularised':>14}")
for key, label, form in (
    ("test_accuracy", "test accuracy", ".2%"),
    ("test_loss", "test loss", ".3f"),
    ("gamma_hat", "gamma-hat, normalised", ".0f"),
    ("best_test_accuracy", "test accuracy of the best epoch", ".2%"),
    ("training_loss", "training loss, wrong labels included", ".3f"),
    ("seconds", "seconds", ".0f"),
):
    print(f"{label:<37}{runs['plain'][key]:>13{form}}{runs['regularised'][key]:>14{form}}")

"""
## What to expect

One seed says little. `python benchmarks/quickstart_seeds.py` runs this script with eight seeds, and
found:

<!-- quickstart_seeds: begin -->
```
8 seeds, 0 to 7, 40 epochs each; mean +- standard deviation
(tensorflow 2.21.0, Keras 3.15.1, 2 CPU cores, x86_64)
                                                  plain       regularised        difference  better
test accuracy                           86.06% +- 1.96%   90.66% +- 2.10%   +4.60% +- 0.71%  8 of 8
test loss                                0.491 +- 0.025    0.452 +- 0.021   -0.039 +- 0.016  8 of 8
gamma-hat, normalised                        -718 +- 84        -978 +- 91        -261 +- 62  8 of 8
test accuracy of the best epoch         92.16% +- 1.36%   93.04% +- 1.05%   +0.88% +- 1.02%  6 of 8
training loss, wrong labels included     0.371 +- 0.105    0.534 +- 0.109   +0.163 +- 0.026
```
<!-- quickstart_seeds: end -->

The column "difference" is the regularised run less the plain run, and "better" counts the seeds in
which the regularised run is better. It learns fewer of the wrong labels, is right about more of the
test digits, and ends in a flatter minimum.

What this does not show: a plain run that is stopped at its best epoch does nearly as well. Digits
with right labels only, which are learned within a few epochs, were not compared. The strength of
the regulariser was chosen on four other seeds; learning rate, epochs and weight decay of the plain
run were not tuned. The two runs have the number of epochs in common, not the time: a regularised
step makes three passes over its batch. And each framework draws other initial weights from a seed,
so that the numbers of one seed differ between TensorFlow, JAX and torch.

The upper row of the picture has the curves of your two runs, the lower row the eight seeds.
"""

results = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results"
rows = json.loads((results / "quickstart_seeds_tensorflow_cpu.json").read_text())["rows"]

figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
flatness = "Normalised gamma-hat: smaller is flatter"
for axis, key, title in (
    (axes[0, 0], "loss", "Training loss"),
    (axes[0, 1], "val_accuracy", "Test accuracy"),
    (axes[0, 2], "gamma_hat", flatness),
):
    axis.plot(range(1, num_epochs + 1), plain_history[key], "--", label="plain")
    axis.plot(range(1, num_epochs + 1), regularised_history[key], "-", label="regularised")
    axis.axvline(
        drop_epoch + 0.5, color="gray", lw=1, ls=":", label="rate drops, regulariser starts"
    )
    axis.set(title=title, xlabel="epoch")
axes[0, 0].set_yscale("log")
axes[0, 0].legend()
axes[0, 1].set_ylim(bottom=0.7)
for axis, key, title in (
    (axes[1, 0], "test_loss", "Test loss"),
    (axes[1, 1], "test_accuracy", "Test accuracy"),
    (axes[1, 2], "gamma_hat", flatness),
):
    seeds = [row["seed"] for row in rows]
    axis.vlines(
        seeds,
        [row["plain"][key] for row in rows],
        [row["regularised"][key] for row in rows],
        color="gray",
        lw=1,
    )
    axis.plot(seeds, [row["plain"][key] for row in rows], "o")
    axis.plot(seeds, [row["regularised"][key] for row in rows], "s")
    axis.set(title=title, xlabel="seed", xticks=seeds)
output.mkdir(parents=True, exist_ok=True)
figure.savefig(output / "quickstart.png", dpi=120)

print(f"\nOne seed says little: eight seeds are drawn below the curves in {output}/quickstart.png,")
print("and README.md has their table.")

"""
## Next

`examples/train_cifar10.py` trains the paper's networks on CIFAR-10. `examples/compare_minima.py`
asks which measures of flatness foretell the test error. `docs/gamma_hat.md` explains how gamma-hat
is computed, and which of its forms compares what.
"""
