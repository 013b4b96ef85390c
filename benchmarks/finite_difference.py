"""Compare InfoMCR's finite difference with the Hessian-vector product that it tends to.

For a network with batch normalisation, trained for a few epochs on scikit-learn's digits, once
with GELU and once with ReLU: the direction (g - g')/alpha, with g the gradient of the loss of a
sub-batch at w and g' its gradient at w - alpha g, against H g in float64. Prints the table and
saves the figure of docs/finite_difference.md:

    python benchmarks/finite_difference.py

Needs the TensorFlow backend, where Keras computes in float64 throughout; a minute on two cores.
"""

import argparse
import contextlib
import os
import pathlib
from unittest import mock

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from models import digits

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.objective import Batch, Objective

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ALPHAS = np.logspace(-6, 0, 19)
SHOWN = (1e-4, 1e-2, 1e-1)
TF32 = "TensorFloat-32, emulated"
POLICIES = {
    "float64": "float64",
    "float32": "float32",
    TF32: "float32",
    "bfloat16": "mixed_bfloat16",
}
# Several lines lie upon each other: the wide ones are drawn first, so that all can be seen.
STYLES = ("lightgreen", 6), ("tab:blue", 3), ("tab:orange", 1.5), ("tab:red", 1.5)
FINITE_DIFFERENCE, PRODUCT = "finite difference", "Hessian-vector product"


def make_model(activation, policy):
    """Return three convolutions with batch normalisation that give logits, of a dtype policy."""
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    inputs = x = keras.Input((8, 8, 1))
    for filters in (16, 32, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.Activation(activation.lower())(keras.layers.BatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    logits = keras.layers.Dense(10, dtype=keras.config.floatx())(x)
    model = RegularizedModel(inputs, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, regularizer=None)
    return model


def loss_as_is(model):
    """Return the loss as a function of the weights, in the precision of the model's policy."""

    def loss(weights, state, batch):
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        with keras.StatelessScope(zip(variables, [*weights, *state])):
            predictions = model(batch.x, training=True)
            return model.compute_loss(batch.x, batch.y, predictions), None

    return loss


@contextlib.contextmanager
def emulated_tf32():
    """Have convolutions and matrix products, and their gradients, take rounded operands.

    The tensor cores of NVIDIA GPUs do the same: they keep 10 binary digits after the first, and add
    in float32.
    """

    @tf.custom_gradient
    def rounded(x):
        bits = tf.bitcast(x, tf.int32)
        nearest = tf.bitcast(tf.bitwise.bitwise_and(bits + 0x1000, ~0x1FFF), tf.float32)
        return nearest, with_rounded_gradient

    @tf.custom_gradient
    def with_rounded_gradient(x):
        return tf.identity(x), rounded

    def of_rounded(operation):
        return lambda a, b, *args, **kwargs: with_rounded_gradient(
            operation(rounded(a), rounded(b), *args, **kwargs)
        )

    with (
        mock.patch.object(tf.nn, "convolution", of_rounded(tf.nn.convolution)),
        mock.patch.object(tf, "matmul", of_rounded(tf.matmul)),
    ):
        yield


def directions(model, function, batch):
    """Return (g - g')/alpha for each alpha, and H g, as flat float64 arrays."""
    objective = Objective(model)
    weights, state = objective.weights(), objective.state()
    value_and_grad = backend.value_and_grad(function)
    _, gradients, products = backend.value_grad_and_hessian_product(function)(
        weights, None, state, batch
    )
    differences = []
    for alpha in ALPHAS:
        moved = [w - float(alpha) * g for w, g in zip(weights, gradients)]
        _, others = value_and_grad(moved, state, batch)
        differences.append((flat(gradients) - flat(others)) / alpha)
    return differences, flat(products)


def flat(arrays):
    """Return all entries of a list of arrays, float64."""
    arrays = map(keras.ops.convert_to_numpy, arrays)
    return np.concatenate([a.ravel().astype("float64") for a in arrays])


def compare(direction, truth):
    """Return the cosine of a direction with the truth and the ratio of their norms."""
    norms = np.linalg.norm(direction), np.linalg.norm(truth)
    return direction @ truth / np.prod(norms), norms[0] / norms[1]


def study(activation, images, labels, epochs):
    """Return `{(precision, estimator): array [number of alphas, 2]}` for a network."""
    keras.utils.set_random_seed(0)
    trained = make_model(activation, "float32")
    trained.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)
    batch = images[:16], labels[:16]
    results, truth = {}, None
    for precision, policy in POLICIES.items():
        model = make_model(activation, policy)
        model.set_weights(trained.get_weights())
        data = Batch(*map(keras.ops.convert_to_tensor, batch))
        with emulated_tf32() if precision == TF32 else contextlib.nullcontext():
            found = {precision: directions(model, loss_as_is(model), data)}
        if precision == "bfloat16":
            found["float32, as the package does under mixed_bfloat16"] = directions(
                model, Objective(model), data
            )
        truth = found["float64"][1] if truth is None else truth
        for name, (differences, product) in found.items():
            results[name, FINITE_DIFFERENCE] = np.array([compare(d, truth) for d in differences])
            results[name, PRODUCT] = np.array([compare(product, truth)] * len(ALPHAS))
    return results


def print_table(results):
    """Print cosine and norm ratio at a few alphas, in Markdown."""
    shown = [int(np.argmin(abs(np.log(ALPHAS / alpha)))) for alpha in SHOWN]
    header = [f"alpha {ALPHAS[i]:.0e}" for i in shown]
    print("| activation | precision |", " | ".join(header), "|", PRODUCT, "|")
    print("|---" * (len(shown) + 3) + "|")
    for activation, of_network in results.items():
        for name, estimator in of_network:
            if estimator == PRODUCT:
                continue
            pairs = [of_network[name, FINITE_DIFFERENCE][i] for i in shown]
            pairs.append(of_network[name, PRODUCT][0])
            cells = [f"{cosine:.3f}, {ratio:.3g}" for cosine, ratio in pairs]
            print(f"| {activation} | {name} |", " | ".join(cells), "|")


def plot(results, path):
    """Save a picture: cosine and norm ratio over alpha, a column for each network."""
    colors = dict(zip(POLICIES, STYLES))
    lines = {FINITE_DIFFERENCE: "-", PRODUCT: ":"}
    figure, axes = plt.subplots(
        2, len(results), figsize=(9, 6.6), sharex=True, sharey="row", layout="constrained"
    )
    for column, (activation, of_network) in zip(axes.T, results.items()):
        for (name, estimator), values in of_network.items():
            if name not in colors:
                continue
            for axis, series in zip(column, values.T):
                label = f"{estimator}, {name}"
                color, width = colors[name]
                axis.plot(ALPHAS, series, lines[estimator], color=color, lw=width, label=label)
        column[0].set(title=activation, xscale="log")
        column[1].set(xlabel="alpha", yscale="log")
    axes[0, 0].set_ylabel("cosine with H g")
    axes[1, 0].set_ylabel("norm relative to H g")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main():
    """Run the study, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training (%(default)s)")
    help = "folder for the picture (%(default)s)"
    parser.add_argument("--output", type=pathlib.Path, default="output", help=help)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = digits(seed=0)
    results = {name: study(name, *data, arguments.epochs) for name in ("GELU", "ReLU")}
    print_table(results)
    plot(results, arguments.output / "finite_difference.png")


if __name__ == "__main__":
    main()
