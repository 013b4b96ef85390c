"""DenseNet-BC for CIFAR."""

import functools

import keras

from networks import layers


def densenet_bc_100_12(input_shape=(32, 32, 3), num_classes=10, l2=0.5e-4):
    """DenseNet-BC of 100 layers, growth rate 12 and compression 0.5: 0.77 M weights.

    InfoMCR's DenseNet-k12. Trained by its authors with weight decay 1e-4, Nesterov momentum 0.9,
    batches of 64 and a learning rate of 0.1, divided by 10 after 150 and 225 of 300 epochs.

    Reference: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, Section 3
    (https://arxiv.org/abs/1608.06993).
    """
    growth = 12
    conv = functools.partial(layers.conv, l2=l2, fan="fan_out")
    inputs = keras.Input(input_shape)
    x = conv(inputs, 2 * growth, 3)
    for stage in range(3):
        if stage:
            x = conv(_activate(x, l2), x.shape[-1] // 2, 1)
            x = keras.layers.AveragePooling2D(2)(x)
        for _ in range((100 - 4) // 6):
            y = conv(_activate(x, l2), 4 * growth, 1)
            y = conv(_activate(y, l2), growth, 3)
            x = keras.layers.Concatenate()([x, y])
    x = _activate(x, l2)
    return inputs, layers.logits(x, num_classes, l2=l2, initializer=layers.torch_dense())


def _activate(x, l2):
    return layers.relu(layers.batch_norm(x, l2=l2))
