"""Train an image classifier as the InfoMCR paper does, with or without its regulariser.

The defaults are those of the paper's code: 200 epochs of SGD with Nesterov momentum in batches of
128, a learning rate of 0.1 that falls to a fifth after 60, 120 and 160 epochs, random crops and
flips, and the regulariser (alpha 1e-4, beta 10, 8 sub-batches) from the first fall on.

    python examples/train_cifar10.py --network resnet-20 --output output/resnet-20

The output folder takes log.csv, TensorBoard's logs where that is installed, checkpoints,
results.json and curves.png. After an interruption the same command with --resume goes on from the
last checkpoint, along the trajectory of an uninterrupted run.

    python examples/train_cifar10.py --data digits --epochs 2 --output output/digits

does not download anything and takes a minute or so on two CPU cores.
"""

import contextlib
import importlib.util

import keras
import run_folder
from augmentation import training_batches
from images import normalize
from networks import NETWORKS
from options import load_images, use_true_float32
from training_settings import parse, regularized, segment

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation


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
    """Return the callbacks that steer and log the run. Keras calls them in this order."""
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
        shuffle=False,  # `training_batches` shuffles
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
