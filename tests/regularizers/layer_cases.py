"""Which layers of `keras.layers` map each example by itself in training: a table of all of them."""

import keras
import numpy as np
from keras import layers

IMAGE, SEQUENCE, VECTOR, VIDEO = (4, 4, 2), (4, 2), (3,), (2, 4, 4, 2)
VOLUME = (4, 4, 4, 2)


def masked(layer):
    return lambda x: layer(layers.Masking()(x))


def attending(layer):
    return lambda x: layer([x, x])


def queried(layer):
    return lambda x: layer(x, x)


def of_two(layer):
    return lambda x: layer([x, layers.Dense(x.shape[-1])(x)])


def known_cases():
    """Return a dictionary of `(shape of an example, function of the input)` by the layer's name."""
    cases = {
        "InputLayer": (VECTOR, lambda x: x),
        "Identity": (VECTOR, layers.Identity()),
        "Dense": (VECTOR, layers.Dense(2, functools_gelu())),
        "EinsumDense": (SEQUENCE, layers.EinsumDense("abc,cd->abd", (None, 3))),
        "Embedding": ("tokens", layers.Embedding(5, 2)),
        "ReversibleEmbedding": ("tokens", layers.ReversibleEmbedding(5, 2)),
        "Activation": (VECTOR, layers.Activation("softmax")),
        "ReLU": (VECTOR, layers.ReLU()),
        "LeakyReLU": (VECTOR, layers.LeakyReLU()),
        "PReLU": (VECTOR, layers.PReLU()),
        "ELU": (VECTOR, layers.ELU()),
        "Softmax": (VECTOR, layers.Softmax()),
        "Masking": (SEQUENCE, masked(layers.GlobalAveragePooling1D())),
        "Flatten": (SEQUENCE, layers.Flatten()),
        "Reshape": (SEQUENCE, layers.Reshape((2, 4))),
        "Permute": (SEQUENCE, layers.Permute((2, 1))),
        "RepeatVector": (VECTOR, layers.RepeatVector(2)),
        "Rescaling": (VECTOR, layers.Rescaling(0.5)),
        "Normalization": (VECTOR, layers.Normalization(mean=0.5, variance=2.0)),
        "Resizing": (IMAGE, layers.Resizing(3, 3)),
        "CenterCrop": (IMAGE, layers.CenterCrop(2, 2)),
        "LayerNormalization": (VECTOR, layers.LayerNormalization()),
        "RMSNormalization": (VECTOR, layers.RMSNormalization()),
        "GroupNormalization": (IMAGE, layers.GroupNormalization(2)),
        "UnitNormalization": (VECTOR, layers.UnitNormalization()),
        "Concatenate": (SEQUENCE, of_two(layers.Concatenate(1))),
        "Dot": (SEQUENCE, of_two(layers.Dot(2))),
        "Attention": (SEQUENCE, attending(layers.Attention())),
        "AdditiveAttention": (SEQUENCE, attending(layers.AdditiveAttention())),
        "MultiHeadAttention": (SEQUENCE, queried(layers.MultiHeadAttention(2, 2))),
        "GroupQueryAttention": (SEQUENCE, queried(layers.GroupQueryAttention(2, 2, 1))),
        "TimeDistributed": (SEQUENCE, layers.TimeDistributed(layers.Dense(2))),
        "RNN": (SEQUENCE, masked(layers.RNN(layers.SimpleRNNCell(2)))),
        "Bidirectional": (SEQUENCE, masked(layers.Bidirectional(layers.GRU(2)))),
        "SimpleRNN": (SEQUENCE, masked(layers.SimpleRNN(2))),
        "LSTM": (SEQUENCE, masked(layers.LSTM(2))),
        "GRU": (SEQUENCE, masked(layers.GRU(2))),
        "LSTMCell": (SEQUENCE, layers.RNN(layers.LSTMCell(2))),
        "GRUCell": (SEQUENCE, layers.RNN(layers.GRUCell(2))),
        "SimpleRNNCell": (SEQUENCE, layers.RNN(layers.SimpleRNNCell(2), return_sequences=True)),
        "StackedRNNCells": (SEQUENCE, layers.RNN([layers.SimpleRNNCell(2), layers.GRUCell(2)])),
        "ConvLSTM1D": (IMAGE, layers.ConvLSTM1D(2, 2)),
        "ConvLSTM2D": (VIDEO, layers.ConvLSTM2D(2, 2)),
        "ConvLSTM3D": ((2, 3, 3, 3, 1), layers.ConvLSTM3D(1, 2)),
        "Dropout": (VECTOR, layers.Dropout(0)),
        "AlphaDropout": (VECTOR, layers.AlphaDropout(0)),
        "GaussianDropout": (VECTOR, layers.GaussianDropout(0)),
        "GaussianNoise": (VECTOR, layers.GaussianNoise(0)),
        "DepthwiseConv1D": (SEQUENCE, layers.DepthwiseConv1D(2)),
        "DepthwiseConv2D": (IMAGE, layers.DepthwiseConv2D(2)),
        "SeparableConv1D": (SEQUENCE, layers.SeparableConv1D(2, 2)),
        "SeparableConv2D": (IMAGE, layers.SeparableConv2D(2, 2)),
    }
    for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"):
        cases[name] = VECTOR, of_two(getattr(layers, name)())
    for n, shape in enumerate((SEQUENCE, IMAGE, VOLUME), start=1):
        for name in ("Conv{}D", "Conv{}DTranspose"):
            name = name.format(n)
            cases[name] = shape, getattr(layers, name)(2, 2)
        for name in ("Max", "Average"):
            cases[f"{name}Pooling{n}D"] = shape, getattr(layers, f"{name}Pooling{n}D")()
            cases[f"Global{name}Pooling{n}D"] = shape, getattr(layers, f"Global{name}Pooling{n}D")()
            adaptive = f"Adaptive{name}Pooling{n}D"
            if hasattr(layers, adaptive):
                cases[adaptive] = shape, getattr(layers, adaptive)(2)
        for name in ("ZeroPadding", "Cropping", "UpSampling"):
            cases[f"{name}{n}D"] = shape, getattr(layers, f"{name}{n}D")()
        cases[f"SpatialDropout{n}D"] = shape, getattr(layers, f"SpatialDropout{n}D")(0)
    return cases


def functools_gelu():
    import functools

    return functools.partial(keras.activations.gelu, approximate=True)


# Layers that draw random numbers, mix examples, assign weights, run functions of the user, take
# text, or are not known to map each example by itself.
UNKNOWN = set(
    """
    AugMix CutMix MixUp RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter
    RandomContrast RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur
    RandomGrayscale RandomHue RandomInvert RandomPerspective RandomPosterization RandomRotation
    RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom BatchNormalization
    SpectralNormalization ActivityRegularization Lambda Layer Wrapper JaxLayer FlaxLayer TFSMLayer
    TorchModuleWrapper Pipeline AutoContrast CategoryEncoding Discretization Equalization
    ContrastLimitedAdaptiveHistogramEqualization HashedCrossing Hashing IntegerLookup
    MaxNumBoundingBoxes MelSpectrogram STFTSpectrogram Solarization StringLookup TextVectorization
    """.split()
)


def examples(shape, number, rng):
    """Return random examples; sequences have masked positions, a different one in each."""
    if shape == "tokens":
        return rng.integers(5, size=(number, 4))
    x = rng.normal(size=(number, *shape))
    if shape == SEQUENCE:
        x[np.arange(number), -1 - np.arange(number) % 3] = 0
    return x
