"""Count the products that `SpectralRadius` needs until its eigenvector has converged, in training.

A perceptron and a convolution network with batch normalisation learn scikit-learn's digits by SGD
under the penalty. Every tenth step the products are counted, for each tolerance, from the vector
that the step before has left (warm) and from a random one (cold), and so are those of the paper's
power iteration from the first (power); and the seconds of a step are measured beside plain Keras's.

    python benchmarks/spectral_radius.py --quick

prints a table. KERAS_BACKEND chooses the backend, TensorFlow or torch.
"""

import argparse
import functools

import keras
import numpy as np
from keras import layers
from models import digits
from timing import in_turn, median_ratios

from keras_infomcr import RegularizedModel
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SpectralRadius


def perceptron(activation):
    """Return `(inputs, logits)` of a perceptron with a hidden layer of 64."""
    inputs = keras.Input((8, 8, 1))
    return inputs, layers.Dense(10)(layers.Dense(64, activation)(layers.Flatten()(inputs)))


def convolutions(activation):
    """Return `(inputs, logits)` of two convolutions with batch normalisation."""
    x = inputs = keras.Input((8, 8, 1))
    for filters, strides in ((16, 1), (32, 2)):
        x = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        x = layers.Activation(activation)(layers.BatchNormalization()(x))
    return inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))


NETWORKS = {"perceptron": perceptron, "convolutions": convolutions}


def make(name, base=keras.Model, activation="relu", **options):
    """Return a compiled model, with the same initial weights in each call."""
    keras.utils.set_random_seed(0)
    model = base(*NETWORKS[name](activation))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, **options)
    return model


class CountingObjective(Objective):
    """Counts the products with the Hessian."""

    products = 0

    def hessian_product(self, *args):
        product = super().hessian_product(*args)

        def counted(vector):
            self.products += 1
            return product(vector)

        return counted


def count(name, batch_size, tolerance, steps):
    """Train, and return the numbers of products from warm and from cold starts."""
    x, y = digits()
    model = make(name, RegularizedModel, regularizer=SpectralRadius(seed=0))
    measured = SpectralRadius(max_products=50, tolerance=tolerance)
    rng, counts = np.random.default_rng(0), {"warm": [], "cold": [], "power": []}
    for step in range(1, steps + 1):
        rows = rng.choice(len(x), batch_size, replace=False)
        model.train_on_batch(x[rows], y[rows])
        if step % 10:
            continue
        rows = rng.choice(len(x), batch_size, replace=False)
        batch = Batch(keras.ops.convert_to_tensor(x[rows]), keras.ops.convert_to_tensor(y[rows]))
        warm = keras.ops.copy(model.regularizer.memory[0])
        cold = keras.ops.convert_to_tensor(rng.standard_normal(warm.shape).astype("float32"))
        for kind, start in (("warm", warm), ("cold", cold)):
            objective = CountingObjective(model)
            measured(objective, batch, [start])
            counts[kind].append(objective.products)
        counts["power"].append(power_iteration(model, batch, warm, tolerance))
    return counts


def power_iteration(model, batch, vector, tolerance, limit=100):
    """Return the number of products until ||H v - lambda v|| <= tolerance |lambda|."""
    objective = Objective(model)
    weights = objective.weights()
    product = objective.hessian_product(weights, objective.state(), batch)
    v = keras.ops.convert_to_numpy(vector)
    for n in range(1, limit + 1):
        u = flat(product(like(weights, v)), weights)
        if np.linalg.norm(u - (u @ v) * v) <= tolerance * abs(u @ v):
            return n
        v = u / np.linalg.norm(u)
    return limit


def flat(arrays, weights):
    """Return a list of arrays like the weights as one vector, `None` being zeros."""
    pairs = zip(arrays, weights)
    parts = [np.zeros(w.shape) if a is None else keras.ops.convert_to_numpy(a) for a, w in pairs]
    return np.concatenate([np.ravel(part) for part in parts])


def like(weights, vector):
    """Return a vector as a list of arrays like the weights."""
    parts = np.split(vector, np.cumsum([np.prod(w.shape, dtype=int) for w in weights])[:-1])
    pairs = zip(parts, weights)
    return [keras.ops.convert_to_tensor(p.reshape(w.shape), w.dtype) for p, w in pairs]


def cost(name, batch_size, rounds):
    """Return the seconds of a step in steps of plain Keras."""
    x, y = digits()
    x, y = x[:batch_size], y[:batch_size]
    ours = make(name, RegularizedModel, regularizer=SpectralRadius(seed=0))
    models = {"plain": make(name), "regularised": ours}
    steps = {k: functools.partial(m.train_on_batch, x, y) for k, m in models.items()}
    in_turn(steps, 2)  # compiles
    return median_ratios(in_turn(steps, rounds), "plain")["regularised"]


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps (%(default)s)")
    help = "numbers of examples in a batch (%(default)s)"
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128], help=help)
    help = "tolerances of the iteration (%(default)s)"
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.01], help=help)
    parser.add_argument("--quick", action="store_true", help="one batch size and tolerance")
    settings = parser.parse_args()
    if settings.quick:
        settings.steps, settings.batch_sizes, settings.tolerances = 200, [32], [0.1]
    print(
        "| network | batch | tolerance | start | products, mean | 90 % | most | step, plain ones |"
    )
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for name in NETWORKS:
        for batch_size in settings.batch_sizes:
            ratio = cost(name, batch_size, rounds=20 if settings.quick else 200)
            for tolerance in settings.tolerances:
                for kind, n in count(name, batch_size, tolerance, settings.steps).items():
                    head = f"| {name} | {batch_size} | {tolerance} | {kind} "
                    figures = f"{np.mean(n):.1f} | {np.quantile(n, 0.9):.0f} | {max(n)}"
                    print(f"{head}| {figures} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
