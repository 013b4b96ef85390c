"""A plain convolutional network."""

import functools

import keras

from networks import layers


def plain_cnn(input_shape=(32, 32, 3), num_classes=10, l2=2.5e-4):
    """Six 3x3 convolutions of 32, 64 and 128 filters, two of each: 0.29 M weights.

    The layers of the InfoMCR paper's "CNN" stand in an appendix that we have not got; these are
    ours, initialised as ResNet-20.
    """
    conv = functools.partial(layers.conv, l2=l2, fan="fan_in")
    norm = functools.partial(layers.batch_norm, l2=l2)
    inputs = x = keras.Input(input_shape)
    for filters in (32, 64, 128):
        for _ in range(2):
            x = layers.relu(norm(conv(x, filters, 3)))
        if filters < 128:
            x = keras.layers.MaxPooling2D()(x)
    return inputs, layers.logits(x, num_classes, l2=l2, initializer=layers.he_normal("fan_in"))
