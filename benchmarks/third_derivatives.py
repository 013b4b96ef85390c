"""Compare two ways to the gradient of v^T H v, which `SpectralRadius` follows.

One is by third derivatives, the other by a difference of gradients, which needs none:

    (g(w + h v) - 2 g(w) + g(w - h v)) / h^2.

Their errors in float32 are relative to the third derivatives in float64, at the weights after
twenty steps on scikit-learn's digits, v being the dominant eigenvector; the time of the first is in
times of the second.

    python benchmarks/third_derivatives.py

prints the table of docs/methods.md. KERAS_BACKEND chooses the backend.
"""

import argparse

import keras
import numpy as np
from models import digits
from spectral_radius import NETWORKS, flat, like, make
from timing import in_turn, median_ratios

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SpectralRadius

if keras.backend.backend() == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)  # else float64 is float32 there

STEPS = (1e-1, 1e-2, 1e-3)


def trained(name, activation, x, y):
    """Return the weights after twenty steps and the eigenvector that the rule has found."""
    model = make(name, RegularizedModel, activation, regularizer=SpectralRadius(seed=0))
    for _ in range(20):
        model.train_on_batch(x, y)
    return model.get_weights(), keras.ops.convert_to_numpy(model.regularizer.memory[0])


def ways(name, activation, dtype, weights, vector, x, y):
    """Return functions without arguments that compute the gradient as a flat array, by way."""
    keras.config.set_floatx(dtype)
    model = make(name, activation=activation)
    model.set_weights(weights)
    objective = Objective(model)
    to_tensor = keras.ops.convert_to_tensor
    batch = Batch(to_tensor(x.astype(dtype)), to_tensor(y))
    at = objective.weights()
    args = at, like(at, vector), objective.state(), batch

    def difference(h):
        def gradient(weights, vector, state, batch):
            points = [[w + s * h * v for w, v in zip(weights, vector)] for s in (1, 0, -1)]
            up, here, down = (objective.evaluate(p, state, batch).gradients for p in points)
            return [(a - 2 * b + c) / h**2 for a, b, c in zip(up, here, down)]

        return gradient

    functions = {"third": objective.curvature_gradient} | {h: difference(h) for h in STEPS}
    compiled = {way: backend.compiled(function) for way, function in functions.items()}
    return {way: lambda f=f: flat(f(*args), at) for way, f in compiled.items()}


def row(name, activation, batch_size, rounds):
    """Return a line of the table."""
    x, y = (array[:batch_size] for array in digits())
    keras.config.set_floatx("float32")
    weights, vector = trained(name, activation, x, y)
    setting = name, activation
    exact = ways(*setting, "float64", weights, vector, x, y)["third"]()
    found = ways(*setting, "float32", weights, vector, x, y)
    errors = [np.linalg.norm(f() - exact) / np.linalg.norm(exact) for f in found.values()]
    times = in_turn({"third": found["third"], "difference": found[STEPS[0]]}, rounds)
    ratio = median_ratios(times, "difference")["third"]
    cells = [f"{error:.0e}" for error in errors]
    return f"| {name}, {activation} | {' | '.join(cells)} | {ratio:.1f} |"


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128, help="examples (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timing (%(default)s)")
    settings = parser.parse_args()
    heads = [f"difference, h = {h:g}" for h in STEPS]
    print(f"| network | third derivatives | {' | '.join(heads)} | time of the first |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in NETWORKS:
        for activation in ("gelu", "relu"):
            print(row(name, activation, settings.batch_size, settings.rounds), flush=True)


if __name__ == "__main__":
    main()
