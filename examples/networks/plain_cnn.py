"""A plain convolutional network."""

import keras

from networks.layers import conv, logits, relu


def plain_cnn(input_shape=(32, 32, 3), num_classes=10, l2=2.5e-4):
    """Six 3x3 convolutions of 32, 64 and 128 filters, without normalisation: 0.29 M weights.

    The layers of the paper's "CNN" stand in an appendix that we have not got; these are ours. No
    layer couples the examples of a batch, so the regularised step takes two passes, not three.
    """
    inputs = x = keras.Input(input_shape)
    for filters in (32, 64, 128):
        for _ in range(2):
            x = relu(conv(x, filters, 3, l2=l2, fan="fan_in"))
        if filters < 128:
            x = keras.layers.MaxPooling2D()(x)
    return inputs, logits(x, num_classes, l2=l2, initializer="glorot_uniform")
