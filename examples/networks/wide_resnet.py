"""Wide residual networks WRN-depth-width-B(3,3) for CIFAR."""

import functools

import keras

from networks import layers


def wrn_28_2(input_shape=(32, 32, 3), num_classes=10, l2=2.5e-4):
    """WRN-28-2-B(3,3), which InfoMCR calls WRN-28-2: 1.47 M weights. See `wide_resnet`."""
    return wide_resnet(28, 2, input_shape, num_classes, l2)


def wrn_28_10(input_shape=(32, 32, 3), num_classes=10, l2=2.5e-4):
    """WRN-28-10-B(3,3): 36.5 M weights. See `wide_resnet`."""
    return wide_resnet(28, 10, input_shape, num_classes, l2)


def wrn_28_2_infomcr(input_shape=(32, 32, 3), num_classes=10, l2=5e-4):
    """WRN-28-2 as InfoMCR's code has it: 1.47 M weights.

    It differs from `wrn_28_2` so: the penalty, twice as strong, falls on the 3x3 convolutions of
    the blocks and on batch normalisation alone; all kernels are initialised by Glorot's uniform
    distribution; the shortcut convolutions see the raw input of their block; and where a
    convolution has stride 2, its input is padded on the lower and right sides only.

    Reference: the repository SeanJia/InfoMCR.
    """
    conv = functools.partial(
        keras.layers.Conv2D, padding="same", use_bias=False, kernel_initializer="glorot_uniform"
    )
    norm = functools.partial(layers.batch_norm, l2=l2)
    inputs = keras.Input(input_shape)
    x = conv(16, 3)(inputs)
    for filters, strides in _blocks(28, 2):
        y = layers.relu(norm(x))
        y = conv(filters, 3, strides=strides, kernel_regularizer=layers.decay(l2))(y)
        y = layers.relu(norm(y))
        y = conv(filters, 3, kernel_regularizer=layers.decay(l2))(y)
        if x.shape[-1] != filters:
            x = conv(filters, 1, strides=strides)(x)
        x = keras.layers.Add()([x, y])
    x = layers.relu(norm(x))
    return inputs, layers.logits(x, num_classes, l2=0.0, initializer="glorot_uniform")


def wide_resnet(depth, width, input_shape=(32, 32, 3), num_classes=10, l2=2.5e-4):
    """Return `(inputs, logits)` of WRN-depth-width with two 3x3 convolutions a block.

    Trained by its authors with weight decay 5e-4 on all weights, Nesterov momentum 0.9, batches
    of 128 and a learning rate of 0.1, multiplied by 0.2 after 60, 120 and 160 of 200 epochs.

    Args:
        depth: Integer, 6 n + 4.
        width: Integer, at least 2, by which the 16, 32 and 64 filters are multiplied.
        input_shape: Tuple `(height, width, channels)`. Defaults to CIFAR's.
        num_classes: Integer, the number of logits. Defaults to 10.
        l2: Float, the coefficient of the sum of squares of all weights. Defaults to 2.5e-4.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016
    (https://arxiv.org/abs/1605.07146), with the constants of the authors' code.
    """
    conv = functools.partial(layers.conv, l2=l2, fan="fan_out")
    norm = functools.partial(layers.batch_norm, l2=l2)
    inputs = keras.Input(input_shape)
    x = conv(inputs, 16, 3)
    for filters, strides in _blocks(depth, width):
        y = layers.relu(norm(x))
        if x.shape[-1] != filters:
            x = conv(y, filters, 1, strides)
        y = conv(y, filters, 3, strides)
        y = conv(layers.relu(norm(y)), filters, 3)
        x = keras.layers.Add()([x, y])
    x = layers.relu(norm(x))
    return inputs, layers.logits(x, num_classes, l2=l2, initializer=layers.torch_dense())


def _blocks(depth, width):
    """Return the filters and strides of the residual blocks."""
    number, rest = divmod(depth - 4, 6)
    if rest or number < 1:
        raise ValueError(f"`depth` must be 6 n + 4. Received: depth={depth}")
    return [
        (width * filters, 2 if block == 0 and filters > 16 else 1)
        for filters in (16, 32, 64)
        for block in range(number)
    ]
