"""What the command lines of the scripts share."""

import argparse

import keras


def positive(text):
    """Return an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1. Received: {text}")
    return int(text)


def add_data(parser):
    """Add the options that `images.load` takes."""
    help = "cifar10, cifar100, digits or an npz file (%(default)s)"
    parser.add_argument("--data", default="cifar10", help=help)
    help = "training images to use, the first ones (all)"
    parser.add_argument("--num-train", type=positive, help=help)


def use_true_float32():
    """Switch TensorFloat-32 off in TensorFlow; on JAX and torch keras_infomcr sees to that."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
