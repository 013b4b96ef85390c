"""Augmented batches in `tf.data`, the same ones whenever a run is taken up again.

What epoch and step see is a function of the seed, the epoch and the step alone.
"""

import keras
import tensorflow as tf
from images import MEAN, STANDARD_DEVIATION

if keras.backend.backend() != "tensorflow":
    tf.config.set_visible_devices([], "GPU")  # leave the memory to the other framework

# The InfoMCR paper's, Section 7.1: the pixels of zeros around the image before it is cropped at
# random, and whether half of the images are flipped.
SCHEMES = {
    "no-aug": (0, False),
    "flip-only": (0, True),
    "1-crop-f": (1, True),
    "4-crop-f": (4, True),
}


def training_batches(images, labels, scheme, batch_size, seed=0, first_epoch=0, use_keras_cv=False):
    """Return an endless data set of shuffled, normalised, augmented batches, epoch by epoch.

    Args:
        images: Array `[N, height, width, 3]` of pixels from 0 to 255.
        labels: Array `[N]` of integers.
        scheme: String, one of `SCHEMES`.
        batch_size: Integer. An epoch has `N // batch_size` batches: the images left over, which
            change from epoch to epoch, are dropped, as the InfoMCR code does.
        seed: Integer.
        first_epoch: Integer, the epoch to begin with, from 0.
        use_keras_cv: Boolean, whether keras-cv's layers crop and flip, rather than `tf.data`.
            What they do has the same distribution.

    Returns:
        `tf.data.Dataset` of pairs `[batch_size, height, width, 3]` (float32), `[batch_size]`.

    Raises:
        ValueError: If there are fewer images than a batch takes.
    """
    if len(images) < batch_size:
        raise ValueError(
            f"`batch_size` must be at most the number of training images, {len(images)}. "
            f"Received: batch_size={batch_size}"
        )
    steps = len(images) // batch_size
    make = keras_cv_augmentation if use_keras_cv else augmentation
    augment = make(images.shape[1:3], *SCHEMES[scheme])
    images, labels = tf.constant(images), tf.constant(labels)

    def one_epoch(epoch):
        epoch_seed = tf.random.fold_in([seed, 0], epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), epoch_seed)
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])

        def batch(step, indices):
            x = (tf.cast(tf.gather(images, indices), tf.float32) - MEAN) / STANDARD_DEVIATION
            return augment(x, tf.random.fold_in(epoch_seed, step + 1)), tf.gather(labels, indices)

        batches = tf.data.Dataset.from_tensor_slices(order).enumerate()
        # keras-cv's layers have a state: one batch after the other.
        return batches.map(batch, num_parallel_calls=None if use_keras_cv else tf.data.AUTOTUNE)

    epochs = tf.data.Dataset.counter(first_epoch)
    return epochs.flat_map(one_epoch).prefetch(tf.data.AUTOTUNE)


def augmentation(size, padding, flip):
    """Return a function that crops and flips each image by itself, in plain TensorFlow.

    Args:
        size: Tuple `(height, width)` of the images.
        padding: Integer, the pixels of zeros on each side before images are cropped back.
        flip: Boolean, whether each image is mirrored with probability one half.

    Returns:
        Function `(images [B, height, width, C], seed [2]) -> images`.
    """

    def augment(images, seed):
        number = images.shape[0]
        crop_seed, flip_seed = tf.unstack(tf.random.split(seed))
        offsets = tf.random.stateless_uniform(
            [number, 2, 1], crop_seed, 0, 2 * padding + 1, tf.int32
        )
        rows, columns = offsets[:, 0] + tf.range(size[0]), offsets[:, 1] + tf.range(size[1])
        if flip:
            flipped = tf.random.stateless_uniform([number, 1], flip_seed) < 0.5
            columns = tf.where(flipped, columns[:, ::-1], columns)
        images = tf.gather(_pad(images, padding), rows, axis=1, batch_dims=1)
        return tf.gather(images, columns, axis=2, batch_dims=1)

    return augment


def keras_cv_augmentation(size, padding, flip):
    """Return the same as `augmentation`, with keras-cv's layers."""
    try:
        import keras_cv
    except ImportError as error:
        raise ImportError('This needs keras-cv: pip install "keras_infomcr[cv]"') from error

    class RandomCrop(keras_cv.layers.RandomCrop):
        """Crops at whole pixels, all offsets equally likely.

        keras-cv 0.9 draws real offsets and resamples the image, so that the outermost offsets
        come up half as often as others, and some rows and columns twice in one image.
        """

        def get_random_transformation_batch(self, batch_size, **kwargs):
            offsets = self._random_generator.uniform([batch_size, 2], 0, 2 * padding + 1, tf.int32)
            # What the layer's resampling takes for whole pixels of an image of `padded` pixels.
            padded = tf.constant(size, tf.float32) + 2 * padding
            shares = tf.cast(offsets, tf.float32) / (2 * padding) * padded / (padded - 1)
            return {"tops": shares[:, :1], "lefts": shares[:, 1:]}

    layers = [RandomCrop(*size, seed=0, dtype="float32")] if padding else []
    layers += [keras_cv.layers.RandomFlip(seed=0, dtype="float32")] if flip else []

    def augment(images, seed):
        images = _pad(images, padding)
        for layer, layer_seed in zip(layers, tf.unstack(tf.random.split(seed))):
            state = tf.concat([[0], tf.cast(layer_seed, tf.int64)], axis=0)
            layer._random_generator.reset(state)
            images = layer(images)
        return images

    return augment


def _pad(images, padding):
    return tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
