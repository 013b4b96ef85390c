"""Count the products that `SharpnessCallback` takes, with and without its warm start.

A perceptron learns 500 of scikit-learn's digits by gradient descent at the edge of stability. Every
20 steps the largest eigenvalues are sought from a random vector (cold) and from the eigenvectors
that the last search has found (warm).

    python benchmarks/sharpness.py

prints the figures of docs/flatness.md: the mean numbers of products, and the share of the warm
searches whose largest eigenvalue is more than 2 % off the cold search's.
"""

import argparse
from unittest import mock

import keras
import numpy as np
from models import digits

from keras_infomcr.flatness import Hessian
from keras_infomcr.flatness.hessian.products import HessianProducts


def make_model():
    """Return a compiled perceptron of 3,466 weights."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "tanh"), keras.layers.Dense(32, "tanh")]
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), *layers, keras.layers.Dense(10)]
    )
    model.compile(keras.optimizers.SGD(0.5), "mse")
    return model


def searched(hessian, count, starts):
    """Return the result of a search and the number of its products."""
    original = HessianProducts.product
    with mock.patch.object(HessianProducts, "product", autospec=True) as product:
        product.side_effect = original
        result = hessian.top_eigenvalues(num_eigenvalues=count, vectors=True, starts=starts)
    return result, product.call_count


def main():
    """Train, count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="training steps (%(default)s)")
    steps = parser.parse_args().steps
    x, y = (array[:500] for array in digits())
    y = keras.utils.to_categorical(y, 10)
    model = make_model()
    hessian = Hessian(model, x, y, chunk_size=500, seed=0)
    counts = {k: {"cold": [], "warm": [], "missed": []} for k in (1, 2, 3, 5)}
    vectors = {}
    for step in range(steps + 1):
        if step % 20 == 0:
            for count, found in counts.items():
                cold, products = searched(hessian, count, None)
                found["cold"].append(products)
                if count in vectors:
                    warm, products = searched(hessian, count, vectors[count])
                    found["warm"].append(products)
                    found["missed"].append(abs(warm.value - cold.value) > 0.02 * cold.value)
                    cold = warm
                vectors[count] = cold.vectors
        model.train_on_batch(x, y)
    print("| eigenvalues | products, cold | products, warm | missed |\n|---:|---:|---:|---:|")
    for count, found in counts.items():
        cold, warm, missed = (np.mean(values) for values in found.values())
        print(f"| {count} | {cold:.1f} | {warm:.1f} | {missed:.1%} |")


if __name__ == "__main__":
    main()
