"""Networks with batch normalisation and smooth activations, in any dtype policy."""

import keras

from keras_infomcr import RegularizedModel


def gelu_network():
    x = inputs = keras.Input((12,))
    for _ in range(2):
        x = keras.layers.Dense(16)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Activation("gelu")(x)
    return RegularizedModel(inputs, keras.layers.Dense(4, dtype="float32")(x))


class GeluNetwork(RegularizedModel):
    """A model whose own kernel gets its half precision only from the autocast of `__call__`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(16)
        self.normalization = keras.layers.BatchNormalization()

    def build(self, shape):
        self.kernel = self.add_weight((16, 4), "glorot_uniform")
        self.dense.build(shape)
        self.normalization.build((shape[0], 16))

    def call(self, x):
        x = keras.activations.gelu(self.normalization(self.dense(x)))
        return keras.ops.cast(x @ keras.ops.cast(self.kernel, x.dtype), "float32")
