"""What the networks are made of."""

import keras


def he_normal(fan):
    """Return a new initialiser of He et al. (2015), not truncated as `keras.initializers` has it.

    Keras gives equal values to all kernels of one shape that share an initialiser.
    """
    return keras.initializers.VarianceScaling(2.0, fan, "untruncated_normal")


def torch_dense():
    """Return a new initialiser like that of torch's dense layers: up to 1 / sqrt(fan_in)."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def decay(l2):
    """Return the weight penalty `l2 * sum(w**2)`."""
    return keras.regularizers.L2(l2) if l2 else None


def conv(x, filters, size, strides=1, *, l2, fan):
    """Convolve without bias, zero-padded by `size // 2` on each side, as torch does."""
    padding = "same"
    if strides > 1 and size > 1:  # Keras's "same" would pad one side more than the other
        x = keras.layers.ZeroPadding2D(size // 2)(x)
        padding = "valid"
    return keras.layers.Conv2D(
        filters,
        size,
        strides,
        padding,
        use_bias=False,
        kernel_initializer=he_normal(fan),
        kernel_regularizer=decay(l2),
    )(x)


def batch_norm(x, *, l2):
    """Normalise with torch's constants."""
    return keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_regularizer=decay(l2), beta_regularizer=decay(l2)
    )(x)


def relu(x):
    """Rectify."""
    return keras.layers.Activation("relu")(x)


def logits(x, num_classes, *, l2, initializer):
    """Average over the image and classify; in the precision of the weights under any policy."""
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dense(
        num_classes,
        kernel_initializer=initializer,
        kernel_regularizer=decay(l2),
        bias_regularizer=decay(l2),
        dtype=keras.config.dtype_policy().variable_dtype,
    )(x)
