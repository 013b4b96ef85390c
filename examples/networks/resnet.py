"""ResNet-20 for CIFAR."""

import functools

import keras

from networks import layers


def resnet_20(input_shape=(32, 32, 3), num_classes=10, l2=0.5e-4):
    """ResNet-20 with parameter-free shortcuts (the paper's option A): 0.27 M weights.

    Trained by its authors with weight decay 1e-4, momentum 0.9 (not Nesterov's), batches of 128 and
    a learning rate of 0.1, divided by 10 after 32,000 and 48,000 of 64,000 steps.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Section 4.2
    (https://arxiv.org/abs/1512.03385).
    """
    conv = functools.partial(layers.conv, l2=l2, fan="fan_in")
    norm = functools.partial(layers.batch_norm, l2=l2)
    inputs = keras.Input(input_shape)
    x = layers.relu(norm(conv(inputs, 16, 3)))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if block == 0 and filters > 16 else 1
            y = layers.relu(norm(conv(x, filters, 3, strides)))
            y = norm(conv(y, filters, 3))
            if strides > 1:  # every other pixel, and zeros for the new channels
                x = keras.layers.AveragePooling2D(1, strides)(x)
                x = keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, filters - x.shape[-1]]])
            x = layers.relu(keras.layers.Add()([x, y]))
    return inputs, layers.logits(x, num_classes, l2=l2, initializer=layers.he_normal("fan_in"))
