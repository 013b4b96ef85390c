"""Compare trained models: test accuracy and gamma-hat, side by side, with standard errors.

    python examples/evaluate_gamma.py output/plain/epoch-200.keras output/flat/epoch-200.keras

Three gamma-hats are printed: as the paper defines it (Eq. 6); with normalised logits, as the paper
compares runs with and without the regulariser; and as the paper's code computes it, half as large,
with batch normalisation in training mode on chunks of 10 images. (The paper's code takes the first
10,000 training images, each once; here all trials draw at random.) Smaller is flatter. Compare only
models of the same architecture, measured with equal settings.
"""

import argparse
import pathlib
import warnings

import keras
import numpy as np
from images import normalize
from options import add_data, load_images, positive, positive_number, use_true_float32

from keras_infomcr.flatness import gamma_hat


def parse(argv=None):
    """Return the models' paths and the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs="+", help="files of the models, as `model.save` writes them (.keras)")
    add_data(parser)
    help = "images drawn for one trial of gamma-hat, the paper's N' (%(default)s)"
    add("--num-examples", type=positive, default=100, help=help)
    help = "trials that gamma-hat averages, the paper's T (%(default)s)"
    add("--num-trials", type=positive, default=100, help=help)
    help = "normalised logits are divided by their norm times this number (%(default)s)"
    add("--scale", type=positive_number, default=0.04, help=help)
    help = "seed that draws the images of the trials (%(default)s)"
    add("--seed", type=int, default=0, help=help)
    settings = parser.parse_args(argv)
    for path in settings.models:
        if not pathlib.Path(path).is_file():
            parser.error(f"models must be .keras files. Received: {path}, which is no file")
    return settings


def measure(path, settings, train_data, test_data):
    """Return the cells of a model's line in the table."""
    with warnings.catch_warnings():
        # Keras cannot place the state of an optimizer that scales losses; it is not needed.
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        try:
            model = keras.saving.load_model(path)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} could not be loaded as a model: {error}") from None
    x, y = test_data
    predictions = model.predict(x, verbose=0)
    cells = [path, f"{np.mean(predictions.argmax(axis=-1) == y):.2%}"]
    conventions = (
        ({}, 1),
        ({"normalize_softmax": True, "softmax_scale": settings.scale}, 1),
        ({"training": True, "chunk_size": 10}, 2),
    )
    for options, divisor in conventions:
        found = gamma_hat(
            model,
            *train_data,
            num_examples=settings.num_examples,
            num_trials=settings.num_trials,
            seed=settings.seed,
            **options,
        )
        cells.append(f"{found.value / divisor:.1f} +- {found.stderr / divisor:.1f}")
    return cells


def main(argv=None):
    """Print the table."""
    settings = parse(argv)
    use_true_float32()
    images = load_images(settings)
    if settings.num_examples > len(images.x_train):
        raise SystemExit(
            "--num-examples must not exceed the number of training images. Received: "
            f"--num-examples {settings.num_examples}, {len(images.x_train)} images. "
            f"Pass --num-examples {len(images.x_train)}."
        )
    train_data = normalize(images.x_train), images.y_train
    test_data = normalize(images.x_test), images.y_test
    rows = [["model", "test accuracy", "gamma-hat", "normalised", "paper's code"]]
    rows += [measure(path, settings, train_data, test_data) for path in settings.models]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:])), sep="  ")
    print("Compare runs with and without the regulariser by the normalised gamma-hat.")


if __name__ == "__main__":
    main()
