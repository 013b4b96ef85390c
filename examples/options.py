"""What the command lines of the scripts share."""

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
    help = "cifar10, cifar100, digits or an npz file (%(default)s)"
    parser.add_argument("--data", default="cifar10", help=help)
    help = "training images to use, the first ones (all)"
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
