"""A table of all layers of `keras.layers`: which map each example by itself in training."""

import functools

import keras
import numpy as np
from keras import layers

VECTOR, SEQUENCE, IMAGE, VIDEO = (3,), (4, 2), (4, 4, 2), (2, 4, 4, 2)
TOKENS = "tokens"


def made(name, *args, **kwargs):
    """Return the function that makes a layer, and calls it."""
    return lambda x: getattr(layers, name)(*args, **kwargs)(x)


def masked(name, *args, **kwargs):
    return lambda x: getattr(layers, name)(*args, **kwargs)(layers.Masking()(x))


def of_two(name, *args, **kwargs):
    """Return the same of a layer of two inputs."""
    layer = made(name, *args, **kwargs)
    return lambda x: layer([x, layers.Dense(x.shape[-1])(x)])


def attending(name, *args):
    return lambda x: getattr(layers, name)(*args)(x, x)


def cell(name):
    return lambda x: layers.RNN(getattr(layers, name)(2), return_sequences=True)(x)


# By the name of a layer: the shape of an example, and a function of the input.
KNOWN = {
    "InputLayer": (VECTOR, lambda x: x),
    "Identity": (VECTOR, made("Identity")),
    "Dense": (VECTOR, made("Dense", 2, functools.partial(keras.activations.softmax, axis=1))),
    "EinsumDense": (SEQUENCE, made("EinsumDense", "abc,cd->abd", (4, 3))),
    "Embedding": (TOKENS, made("Embedding", 5, 2)),
    "ReversibleEmbedding": (TOKENS, made("ReversibleEmbedding", 5, 2)),
    "Activation": (VECTOR, made("Activation", "softmax")),
    "ReLU": (VECTOR, made("ReLU")),
    "LeakyReLU": (VECTOR, made("LeakyReLU")),
    "PReLU": (VECTOR, made("PReLU")),
    "ELU": (VECTOR, made("ELU")),
    "Softmax": (VECTOR, made("Softmax")),
    "Masking": (SEQUENCE, masked("GlobalAveragePooling1D")),
    "Flatten": (SEQUENCE, made("Flatten")),
    "Reshape": (SEQUENCE, made("Reshape", (2, 4))),
    "Permute": (SEQUENCE, made("Permute", (2, 1))),
    "RepeatVector": (VECTOR, made("RepeatVector", 2)),
    "Rescaling": (VECTOR, made("Rescaling", 0.5)),
    "Normalization": (VECTOR, made("Normalization", mean=0.5, variance=2.0)),
    "Resizing": (IMAGE, made("Resizing", 3, 3)),
    "CenterCrop": (IMAGE, made("CenterCrop", 2, 2)),
    "LayerNormalization": (VECTOR, made("LayerNormalization")),
    "RMSNormalization": (VECTOR, made("RMSNormalization")),
    "GroupNormalization": (IMAGE, made("GroupNormalization", 2)),
    "UnitNormalization": (VECTOR, made("UnitNormalization")),
    **{name: (VECTOR, of_two(name)) for name in ("Add", "Subtract", "Multiply", "Average")},
    **{name: (VECTOR, of_two(name)) for name in ("Maximum", "Minimum")},
    "Concatenate": (SEQUENCE, of_two("Concatenate", 1)),
    "Dot": (SEQUENCE, of_two("Dot", 2)),
    "Attention": (SEQUENCE, of_two("Attention")),
    "AdditiveAttention": (SEQUENCE, of_two("AdditiveAttention")),
    "MultiHeadAttention": (SEQUENCE, attending("MultiHeadAttention", 2, 2)),
    "GroupQueryAttention": (SEQUENCE, attending("GroupQueryAttention", 2, 2, 1)),
    "TimeDistributed": (SEQUENCE, lambda x: layers.TimeDistributed(layers.Dense(2))(x)),
    "RNN": (SEQUENCE, lambda x: layers.RNN(layers.GRUCell(2))(layers.Masking()(x))),
    "Bidirectional": (
        SEQUENCE, lambda x: layers.Bidirectional(layers.GRU(2))(layers.Masking()(x))
    ),
    **{name: (SEQUENCE, masked(name, 2)) for name in ("SimpleRNN", "LSTM", "GRU")},
    **{name: (SEQUENCE, cell(name)) for name in ("SimpleRNNCell", "LSTMCell", "GRUCell")},
    "StackedRNNCells": (
        SEQUENCE, lambda x: layers.RNN([layers.SimpleRNNCell(2), layers.GRUCell(2)])(x)
    ),
    "ConvLSTM1D": (IMAGE, made("ConvLSTM1D", 2, 2)),
    "ConvLSTM2D": (VIDEO, made("ConvLSTM2D", 2, 2)),
    "ConvLSTM3D": ((2, *VIDEO), made("ConvLSTM3D", 1, 2)),
    **{name: (VECTOR, made(name, 0)) for name in ("Dropout", "AlphaDropout", "GaussianDropout")},
    "GaussianNoise": (VECTOR, made("GaussianNoise", 0)),
    "DepthwiseConv1D": (SEQUENCE, made("DepthwiseConv1D", 2)),
    "DepthwiseConv2D": (IMAGE, made("DepthwiseConv2D", 2)),
    "SeparableConv1D": (SEQUENCE, made("SeparableConv1D", 2, 2)),
    "SeparableConv2D": (IMAGE, made("SeparableConv2D", 2, 2)),
    **{
        name.format(n): (shape, made(name.format(n), *args))
        for n, shape in ((1, SEQUENCE), (2, IMAGE), (3, VIDEO))
        for name, args in {
            "Conv{}D": (2, 2), "Conv{}DTranspose": (2, 2), "MaxPooling{}D": (2,),
            "AveragePooling{}D": (2,), "GlobalMaxPooling{}D": (), "GlobalAveragePooling{}D": (),
            "AdaptiveMaxPooling{}D": (2,), "AdaptiveAveragePooling{}D": (2,),
            "ZeroPadding{}D": (), "Cropping{}D": ((1, 0) if n == 1 else ((1, 0),) * n,),
            "UpSampling{}D": (), "SpatialDropout{}D": (0,),
        }.items()
    },
}  # fmt: skip

# Their likes are tried in every run of the tests.
SLOW = {name for name in KNOWN if name.endswith(("1D", "3D", "Cell"))} | set(
    """
    GRU RNN StackedRNNCells Bidirectional ConvLSTM2D Subtract Multiply Average Minimum ELU LeakyReLU
    AlphaDropout GaussianDropout GroupQueryAttention AdditiveAttention SeparableConv2D SimpleRNN
    TimeDistributed AdaptiveAveragePooling2D AdaptiveMaxPooling2D ReversibleEmbedding Maximum
    RMSNormalization UnitNormalization Cropping2D ZeroPadding2D UpSampling2D SpatialDropout2D
    GaussianNoise GlobalMaxPooling2D CenterCrop Rescaling Permute RepeatVector Softmax ReLU Identity
    """.split()
)

# They mix examples, draw random numbers, assign weights, run functions of the user or take text; or
# nobody has looked.
UNKNOWN = set(
    """
    ActivityRegularization AugMix AutoContrast BatchNormalization CategoryEncoding
    ContrastLimitedAdaptiveHistogramEqualization CutMix Discretization Equalization FlaxLayer
    HashedCrossing Hashing IntegerLookup JaxLayer Lambda Layer MaxNumBoundingBoxes MelSpectrogram
    MixUp Pipeline RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter
    RandomContrast RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur
    RandomGrayscale RandomHue RandomInvert RandomPerspective RandomPosterization RandomRotation
    RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom STFTSpectrogram
    Solarization SpectralNormalization StringLookup TFSMLayer TextVectorization TorchModuleWrapper
    Wrapper
    """.split()
)


def input_of(shape):
    return keras.Input((4,), dtype="int32") if shape == TOKENS else keras.Input(shape)


def examples(shape, number, rng):
    """Return random examples. In sequences other positions are zero in each example."""
    if shape == TOKENS:
        return rng.integers(5, size=(number, 4))
    x = rng.normal(size=(number, *shape))
    if shape == SEQUENCE:
        x[np.arange(number), np.arange(number) % 3 + 1] = 0
    return x
