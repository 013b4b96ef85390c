"""Options that several scripts have, and checks of what is given for them."""

import argparse

import keras
from images import load


def positive(text):
    """Return an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1. Received: {text}")
    return int(text)


def positive_number(text):
    """Return a number greater than 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0. Received: {text}")
    return number


def add_data(parser):
    """Add the options that `load_images` takes."""
    help = "images: cifar10 or cifar100, which Keras downloads; digits, from scikit-learn; or the "
    help += "path of an npz file with x_train, y_train, x_test and y_test (%(default)s)"
    parser.add_argument("--data", default="cifar10", help=help)
    help = "use only so many of the training images, the first ones (default: all)"
    parser.add_argument("--num-train", type=positive, help=help)


def load_images(settings):
    """Return the images that the options ask for, or end with a line that says what is wrong."""
    try:
        return load(settings.data, settings.num_train)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data {settings.data}: {error}") from None


def use_true_float32():
    """Switch TensorFloat-32 off in TensorFlow; on JAX and torch keras_infomcr sees to that."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
