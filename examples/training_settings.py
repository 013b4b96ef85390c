"""The command line of train_cifar10.py, and what follows from it for each epoch."""

import argparse
import pathlib

import keras
from augmentation import SCHEMES
from networks import NETWORKS
from options import add_data, positive

# Whether the InfoMCR code regularises the epochs before the first fall of the learning rate, from
# the first to the second, and after the second.
SEGMENTS = ("111", "011", "001", "100", "010")


def parse(argv=None):
    """Return the settings of a run."""
    description = (
        "Train an image classifier as the InfoMCR paper does, with or without its regulariser"
    )
    parser = argparse.ArgumentParser(description=f"{description}.")
    add_data(parser)
    _add_training(parser.add_argument)
    _add_regularizer(parser.add_argument)
    _add_logging(parser.add_argument)
    _add_running(parser.add_argument)
    settings = parser.parse_args(argv)
    if settings.boundaries is None:
        settings.boundaries = [max(1, round(settings.epochs * share)) for share in (0.3, 0.6, 0.8)]
    _check(settings, parser.error)
    return settings


def segment(epoch, settings):
    """Return the number, from 0, of the learning rate's segment that an epoch is in."""
    return sum(epoch >= boundary for boundary in settings.boundaries)


def regularized(epoch, settings):
    """Return whether an epoch follows a fall of the rate, or its segment's digit is 1."""
    digits = settings.regularize
    if digits == "after-drop":
        return segment(epoch, settings) > 0
    return digits[min(segment(epoch, settings), len(digits) - 1)] == "1"


def _add_training(add):
    help = "network of examples/networks (%(default)s)"
    add("--network", choices=NETWORKS, default="resnet-20", help=help)
    help = "weight penalty: coefficient of the sum of squared weights (default: as in the paper "
    help += "of the network)"
    add("--l2", type=float, help=help)
    add("--batch-size", type=positive, default=128, help="images in a batch (%(default)s)")
    help = "passes over the training images (%(default)s)"
    add("--epochs", type=positive, default=200, help=help)
    help = "learning rates of the segments of the training, one after the other (%(default)s)"
    rates = [0.1, 0.02, 0.004, 0.0008]
    add("--learning-rates", type=float, nargs="+", default=rates, help=help)
    help = "epochs after which the next segment begins (default: 3, 6 and 8 tenths of all epochs)"
    add("--boundaries", type=positive, nargs="*", help=help)
    help = "how training images are varied: crops of images padded by 1 or 4 pixels, flips, both "
    help += "or nothing (%(default)s)"
    add("--augmentation", choices=SCHEMES, default="4-crop-f", help=help)
    help = "crop and flip by layers of keras-cv instead of TensorFlow functions"
    add("--keras-cv", action="store_true", help=help)
    help = "seed of the weights, the batches and the augmentation (%(default)s)"
    add("--seed", type=int, default=0, help=help)


def _add_regularizer(add):
    help = "when the regulariser acts: never; after-drop: once the learning rate has dropped; or "
    help += "three digits, 1 or 0, for the first segment, the second, and all that follow "
    help += "(%(default)s)"
    add("--regularize", choices=("never", "after-drop", *SEGMENTS), default="011", help=help)
    help = "how far the regulariser moves the weights: this times the gradient (%(default)s)"
    add("--alpha", type=float, default=1e-4, help=help)
    add("--beta", type=float, default=10.0, help="strength of the regulariser (%(default)s)")
    help = "sub-batches that the regulariser cuts a batch into, the paper's M (%(default)s)"
    add("--num-sub-batches", type=positive, default=8, help=help)
    help = "take the training gradient from a pass over the full batch, or from the passes over "
    help += "the sub-batches; auto: from the sub-batches where both are the same (%(default)s)"
    gradients = ("auto", "full_batch", "sub_batches")
    add("--main-gradient", choices=gradients, default="auto", help=help)


def _add_logging(add):
    help = "epochs from one measurement of gamma-hat to the next (default: no measurement). The "
    help += "logits are not normalised: follow one run by it, compare runs by evaluate_gamma.py"
    add("--gamma-every", type=positive, help=help)
    help = "draws of 100 images that a measurement of gamma-hat averages (%(default)s)"
    add("--gamma-trials", type=positive, default=10, help=help)
    help = "epochs from one evaluation on the test images to the next (%(default)s)"
    add("--evaluate-every", type=positive, default=1, help=help)
    help = "epochs from one checkpoint to the next (%(default)s)"
    add("--checkpoint-every", type=positive, default=10, help=help)
    help = "folder for logs, checkpoints, results and curves (%(default)s)"
    add("--output", type=pathlib.Path, default=pathlib.Path("output/cifar10"), help=help)
    help = "go on from the last checkpoint in the folder; other settings must be as they were"
    add("--resume", action="store_true", help=help)
    help = "what is printed: 0 no epochs, 1 a progress bar, 2 a line for each epoch (%(default)s)"
    add("--verbose", type=int, choices=(0, 1, 2), default=1, help=help)


def _add_running(add):
    help = "dtype policy of Keras, for example mixed_bfloat16 (%(default)s)"
    add("--dtype", default="float32", help=help)
    help = "compile the training step with XLA or torch.compile; auto: as Keras decides "
    help += "(%(default)s)"
    add("--jit", choices=("auto", "on", "off"), default="auto", help=help)
    help = "train on one device, or on all GPUs by tf.distribute.MirroredStrategy (%(default)s)"
    add("--strategy", choices=("none", "mirrored"), default="none", help=help)


def _check(settings, error):
    """Call `error`, which ends the script, if settings contradict each other."""
    if sorted(settings.boundaries) != settings.boundaries:
        error(f"--boundaries must not decrease. Received: {settings.boundaries}")
    if len(settings.learning_rates) != len(settings.boundaries) + 1:
        error(
            "--learning-rates must be one more than --boundaries. "
            f"Received: {settings.learning_rates} and {settings.boundaries}"
        )
    epochs = range(settings.epochs)
    if settings.regularize != "never" and not any(regularized(e, settings) for e in epochs):
        error(
            "--regularize must leave an epoch to regularise. Received: --regularize "
            f"{settings.regularize}, --epochs {settings.epochs}, --boundaries "
            f"{settings.boundaries}. Take more epochs, or pass --regularize 111 to regularise all "
            "of them, or --regularize never."
        )
    if settings.strategy == "mirrored" and keras.backend.backend() != "tensorflow":
        error(
            "--strategy mirrored needs the TensorFlow backend. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
