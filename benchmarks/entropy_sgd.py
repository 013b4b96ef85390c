"""Time a step of `EntropySGD` against as many plain steps on its mini-batches, in turn.

The perceptron of the other benchmarks on random data. Both ways make one pass over the same
examples; with noise, each inner step also draws as many numbers as there are weights.

    python benchmarks/entropy_sgd.py

prints the figures of docs/methods.md. KERAS_BACKEND chooses the backend.
"""

import argparse

import keras
from models import make, random_data
from timing import in_turn, median_ratios, seconds_of

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import EntropySGD


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--num-steps", type=int, default=20, help="inner steps (%(default)s)")
    add("--mini-batch", type=int, default=64, help="examples of an inner step (%(default)s)")
    add("--rounds", type=int, default=20, help="rounds of timing (%(default)s)")
    settings = parser.parse_args()
    count, size = settings.num_steps, settings.mini_batch
    plain = make("mlp")
    x, y = random_data(plain, count * size)
    parts = [slice(k * size, (k + 1) * size) for k in range(count)]

    def plain_steps():
        for part in parts:
            plain.train_on_batch(x[part], y[part])

    steps = {"plain": plain_steps}
    for name, noise in (("with noise", 1e-4), ("without noise", 0.0)):
        rule = EntropySGD(count, noise=noise, seed=0)
        model = make("mlp", RegularizedModel, regularizer=rule, optimizer=keras.optimizers.SGD(1.0))
        steps[name] = lambda model=model: model.train_on_batch(x, y)
    first = {name: seconds_of(step) for name, step in steps.items()}
    in_turn(steps, 2)  # the second call may still compile something
    ratios = median_ratios(in_turn(steps, settings.rounds), "plain")
    print(f"{keras.backend.backend()}, {count} mini-batches of {size}")
    print("| step | time, plain steps on the mini-batches | first call, s |\n|---|---:|---:|")
    for name in steps:
        print(f"| {name} | {ratios[name]:.2f} | {first[name]:.1f} |")


if __name__ == "__main__":
    main()
