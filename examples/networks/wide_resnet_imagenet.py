"""WRN-18-1.5 for ImageNet."""

import functools

import keras

from networks import layers


def wrn_18_1_5(input_shape=(128, 128, 3), num_classes=1000, l2=0.5e-4):
    """ResNet-18 with 1.5 times the filters in its blocks: 25.9 M weights.

    The InfoMCR paper trains it on ImageNet at 128 x 128 pixels. Blocks as in the first paper on
    residual networks (the activation after the sum), shortcuts of option B, weight decay 1e-4.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, Section 3.4
    (https://arxiv.org/abs/1605.07146), with the constants of the authors' code.
    """
    conv = functools.partial(layers.conv, l2=l2, fan="fan_in")
    norm = functools.partial(layers.batch_norm, l2=l2)
    inputs = keras.Input(input_shape)
    x = layers.relu(norm(conv(inputs, 64, 7, 2)))
    # Zeros are no greater than what the activation leaves, so they serve as padding.
    x = keras.layers.MaxPooling2D(3, 2)(keras.layers.ZeroPadding2D(1)(x))
    for filters in (96, 192, 384, 768):
        for block in range(2):
            strides = 2 if block == 0 and filters > 96 else 1
            y = layers.relu(norm(conv(x, filters, 3, strides)))
            y = norm(conv(y, filters, 3))
            if x.shape[-1] != filters:
                x = norm(conv(x, filters, 1, strides))
            x = layers.relu(keras.layers.Add()([x, y]))
    return inputs, layers.logits(x, num_classes, l2=l2, initializer=layers.torch_dense())
