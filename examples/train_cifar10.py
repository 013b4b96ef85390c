"""Train an image classifier as the InfoMCR paper does, with or without its regulariser.

The defaults are those of the paper's code: 200 epochs of SGD with Nesterov momentum in batches of
128, a learning rate of 0.1 that falls to a fifth after 60, 120 and 160 epochs, random crops and
flips, and the regulariser (alpha 1e-4, beta 10, 8 sub-batches) from the first fall on.

    python examples/train_cifar10.py --network resnet-20 --output output/resnet-20

The output folder takes log.csv, TensorBoard's logs where that is installed, checkpoints,
results.json and curves.png. After an interruption the same command with --resume goes on from the
last checkpoint, along the trajectory of an uninterrupted run.

    python examples/train_cifar10.py --data digits --epochs 2 --output output/digits

downloads nothing and takes a minute or so on two CPU cores.
"""

import argparse
import contextlib
import importlib.util
import pathlib

import keras
import run_folder
from augmentation import SCHEMES, training_batches
from images import normalize
from networks import NETWORKS
from options import add_data, load_images, positive, use_true_float32

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

# Whether the InfoMCR code regularises the epochs before the first fall of the learning rate, from
# the first to the second, and after the second.
SEGMENTS = ("111", "011", "001", "100", "010")


def parse(argv=None):
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_data(parser)
    add("--network", choices=NETWORKS, default="resnet-20", help="architecture (%(default)s)")
    add("--l2", type=float, help="coefficient of the sum of squared weights (its paper's)")
    add("--batch-size", type=positive, default=128, help="images in a batch (%(default)s)")
    add("--epochs", type=positive, default=200, help="passes over the images (%(default)s)")
    rates = [0.1, 0.02, 0.004, 0.0008]
    add("--learning-rates", type=float, nargs="+", default=rates, help="by segment %(default)s")
    help = "epochs after which a segment ends (3, 6 and 8 tenths of all)"
    add("--boundaries", type=positive, nargs="*", help=help)
    add("--augmentation", choices=SCHEMES, default="4-crop-f", help="of images (%(default)s)")
    add("--keras-cv", action="store_true", help="augment with keras-cv's layers")
    help = "segments to regularise, the last digit for all that follow; or when (%(default)s)"
    add("--regularize", choices=("never", "after-drop", *SEGMENTS), default="011", help=help)
    add("--alpha", type=float, default=1e-4, help="size of the perturbation (%(default)s)")
    add("--beta", type=float, default=10.0, help="strength of the regulariser (%(default)s)")
    add("--num-sub-batches", type=positive, default=8, help="M of the paper (%(default)s)")
    gradients = ("auto", "full_batch", "sub_batches")
    add("--main-gradient", choices=gradients, default="auto", help="its source (%(default)s)")
    help = "epochs between measurements of gamma-hat, N' = 100, not normalised: follow one run by "
    help += "it, and compare runs by the normalised one of evaluate_gamma.py (never)"
    add("--gamma-every", type=positive, help=help)
    add("--gamma-trials", type=positive, default=10, help="of each (%(default)s)")
    add("--evaluate-every", type=positive, default=1, help="epochs between tests (%(default)s)")
    add("--checkpoint-every", type=positive, default=10, help="likewise (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches, augmentation (%(default)s)")
    add("--dtype", default="float32", help="policy, for example mixed_bfloat16 (%(default)s)")
    add("--jit", choices=("auto", "on", "off"), default="auto", help="compile (%(default)s)")
    add("--strategy", choices=("none", "mirrored"), default="none", help="of tf.distribute")
    default = pathlib.Path("output/cifar10")
    add("--output", type=pathlib.Path, default=default, help="folder (%(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    add("--verbose", type=int, choices=(0, 1, 2), default=1, help="as of `fit` (%(default)s)")
    settings = parser.parse_args(argv)

    if settings.boundaries is None:
        settings.boundaries = [max(1, round(settings.epochs * share)) for share in (0.3, 0.6, 0.8)]
    if sorted(settings.boundaries) != settings.boundaries:
        parser.error(f"--boundaries must not decrease. Received: {settings.boundaries}")
    if len(settings.learning_rates) != len(settings.boundaries) + 1:
        parser.error(
            "--learning-rates must be one more than --boundaries. "
            f"Received: {settings.learning_rates} and {settings.boundaries}"
        )
    epochs = range(settings.epochs)
    acts = settings.regularize == "never" or any(regularized(e, settings) for e in epochs)
    if not acts:
        parser.error(
            "--regularize must leave an epoch to regularise. Received: --regularize "
            f"{settings.regularize}, --epochs {settings.epochs}, --boundaries "
            f"{settings.boundaries}. Take more epochs, or pass --regularize 111 to regularise all "
            "of them, or --regularize never."
        )
    if settings.strategy == "mirrored" and keras.backend.backend() != "tensorflow":
        parser.error(
            "--strategy mirrored needs the TensorFlow backend. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
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


class RegularizeSegments(keras.callbacks.Callback):
    """Open the gate of the regulariser in the segments whose digit is 1, else close it."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def on_epoch_begin(self, epoch, logs=None):
        self.model.regularizer_active = regularized(epoch, self.settings)


def make_model(settings, images):
    """Return the compiled network."""
    make = NETWORKS[settings.network]
    options = {} if settings.l2 is None else {"l2": settings.l2}
    model = RegularizedModel(*make(images.x_train.shape[1:], images.num_classes, **options))
    regularizer = None
    if settings.regularize != "never":
        regularizer = SubBatchPerturbation(
            alpha=settings.alpha,
            beta=settings.beta,
            num_sub_batches=settings.num_sub_batches,
            main_gradient=settings.main_gradient,
        )
    model.compile(
        keras.optimizers.SGD(settings.learning_rates[0], momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            "accuracy",
            # The loss without the weight penalty.
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
        ],
        jit_compile={"auto": "auto", "on": True, "off": False}[settings.jit],
        regularizer=regularizer,
    )
    return model


def make_callbacks(settings, train_data):
    """Return what steers and logs the run, in this order."""
    rates = settings.learning_rates
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: rates[segment(epoch, settings)])
    ]
    if settings.regularize == "after-drop":
        callbacks.append(StartRegAfterLRDrop(verbose=1))
    elif settings.regularize != "never":
        callbacks.append(RegularizeSegments(settings))
    if settings.gamma_every:
        callbacks.append(
            GammaHatCallback(
                train_data,
                num_trials=settings.gamma_trials,
                frequency=settings.gamma_every,
                verbose=1,
            )
        )
    callbacks.append(keras.callbacks.CSVLogger(settings.output / "log.csv", append=True))
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(keras.callbacks.TensorBoard(settings.output / "tensorboard"))
    callbacks.append(run_folder.Checkpoint(settings.output, settings.checkpoint_every))
    return callbacks


def make_scope(settings):
    """Return the context in which the model is made."""
    if settings.strategy == "none":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.distribute.MirroredStrategy().scope()


def main(argv=None):
    """Train, and leave everything in the output folder."""
    settings = parse(argv)
    images = load_images(settings)
    use_true_float32()
    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.dtype)
    with make_scope(settings):
        model = make_model(settings, images)
        first_epoch = run_folder.prepare(settings, model)
    batches = training_batches(
        images.x_train,
        images.y_train,
        settings.augmentation,
        settings.batch_size,
        settings.seed,
        first_epoch,
        settings.keras_cv,
    )
    train_data = normalize(images.x_train), images.y_train
    test_data = normalize(images.x_test), images.y_test
    every, epochs = settings.evaluate_every, settings.epochs
    model.fit(
        batches,
        shuffle=False,  # they are
        steps_per_epoch=len(images.x_train) // settings.batch_size,
        initial_epoch=first_epoch,
        epochs=epochs,
        validation_data=test_data,
        validation_batch_size=settings.batch_size,
        # The first epoch too, because CSVLogger takes its columns from it.
        validation_freq=[first_epoch + 1, *range(every, epochs, every), epochs],
        callbacks=make_callbacks(settings, train_data),
        verbose=settings.verbose,
    )
    run_folder.finish(settings, model, train_data, test_data)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command with --resume goes on from the last checkpoint."
        ) from None
