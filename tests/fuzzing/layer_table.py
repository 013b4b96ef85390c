"""How the fuzzer calls each layer of Keras: the ranks it takes, with the batch, and its arguments.

`LAYERS` holds functions of a draw that return a layer of one tensor, `CALLS` functions of a tensor
and a draw that return the layer's output, `EXCLUDED` reasons. A layer of `keras.layers` that is in
none of them fails `test_every_layer_of_keras_is_listed`.
"""

import keras
import numpy as np
from frameworks import BACKEND
from keras import layers

WORDS, NUM_WORDS = "words", 5  # integers `[n, 4]` from 0 to 4
FLAT, SEQUENCE, IMAGE, VOLUME = 2, 3, 4, 5
ANY = (FLAT, SEQUENCE, IMAGE)
SHAPES = {WORDS: (4,), FLAT: (6,), SEQUENCE: (4, 3), IMAGE: (5, 4, 3), VOLUME: (3, 3, 2, 2)}
# Without "softsign", of which TensorFlow has no second derivative, "glu", which halves the
# features, and "threshold", which needs arguments.
ACTIVATIONS = (
    "tanh", "gelu", "relu", "softplus", "elu", "selu", "silu", "sigmoid", "mish",
    "exponential", "hard_sigmoid", "leaky_relu", "relu6", "log_softmax", "softmax", "celu",
    "hard_silu", "hard_tanh", "log_sigmoid", "soft_shrink", "sparse_plus", "squareplus",
    "tanh_shrink", "hard_shrink", "sparse_sigmoid", "sparsemax", "linear",
)  # fmt: skip
VALUES = {"value_range": (0.0, 1.0)}


def pick(draw, *choices):
    return choices[draw.integers(len(choices))]


def flip(draw):
    return bool(draw.integers(2))


def activation(draw):
    return pick(draw, *ACTIVATIONS)


def beside(x):
    """Return another tensor of the same shape."""
    return layers.Dense(x.shape[-1], "tanh")(x)


def _merge(name):
    return ANY, lambda x, d: getattr(layers, name)()([x, beside(x)])


def _penalty(d):
    return pick(d, None, None, keras.regularizers.L1L2(1 / 64, 1 / 32))


def _conv(name, rank, **kwargs):
    def make(d):
        dilation = pick(d, 1, 1, 2) if "Transpose" not in name else 1
        settings = {
            "strides": 1 if dilation > 1 else pick(d, 1, 2),
            "padding": pick(d, "same", "same", "valid") if dilation == 1 else "same",
            "dilation_rate": dilation,
            "use_bias": flip(d),
            "activation": activation(d),
        }
        if name.startswith("Separable"):
            settings["depth_multiplier"] = pick(d, 1, 2)
        filters = () if name.startswith("Depthwise") else (pick(d, 2, 3),)
        return getattr(layers, name)(*filters, 2, **settings, **kwargs)

    return (rank,), make


def _pool(name, rank):
    return (rank,), lambda d: getattr(layers, name)(
        2, pick(d, 1, 2), pick(d, "same", "valid"), dtype=_computed_in(rank)
    )


def _adaptive(name, rank):
    return (rank,), lambda d: getattr(layers, name)(2, dtype=_computed_in(rank))


def _computed_in(rank):
    """Return the dtype of a pooling layer; TensorFlow cannot pool volumes in float64."""
    return "float32" if rank == VOLUME else None


def _global_pool(name, rank):
    return (rank,), lambda d: getattr(layers, name)(keepdims=flip(d))


def _recurrent(name):
    def make(d):
        settings = {"return_sequences": flip(d), "go_backwards": flip(d), "unroll": flip(d)}
        if name == "GRU":
            settings["reset_after"] = flip(d)
        if flip(d):
            settings |= {"dropout": 0.25, "recurrent_dropout": pick(d, 0.0, 0.25)}
        return getattr(layers, name)(pick(d, 2, 3), **settings)

    return (SEQUENCE,), make


def _cell(make):
    return (SEQUENCE,), lambda d: layers.RNN(make(d), return_sequences=flip(d))


def _image(make):
    return (IMAGE,), lambda d: make(d)


def _pipeline():
    return layers.Pipeline([layers.RandomFlip(), layers.RandomContrast(0.5, (0, 1))])


def in_float32(make, **kwargs):
    """Return a layer made of layers that cannot compute in float64 on TensorFlow."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    layer = make(**kwargs)
    keras.config.set_dtype_policy(before)
    return layer


LAYERS = {
    "Activation": (ANY, lambda d: layers.Activation(activation(d))),
    "ActivityRegularization": (ANY, lambda d: layers.ActivityRegularization(1 / 64, 1 / 32)),
    "AlphaDropout": (ANY, lambda d: layers.AlphaDropout(0.25)),
    "AugMix": _image(lambda d: in_float32(layers.AugMix, **VALUES, num_chains=2, chain_depth=2)),
    "AutoContrast": _image(lambda d: layers.AutoContrast(**VALUES)),
    "BatchNormalization": (
        (*ANY, VOLUME),
        lambda d: layers.BatchNormalization(
            momentum=pick(d, 0.75, 0.99), center=flip(d), scale=flip(d)
        ),
    ),
    "Bidirectional": (
        (SEQUENCE,),
        lambda d: layers.Bidirectional(
            getattr(layers, pick(d, "LSTM", "GRU", "SimpleRNN"))(2, return_sequences=flip(d)),
            merge_mode=pick(d, "concat", "sum", "mul", "ave"),
        ),
    ),
    "CenterCrop": _image(lambda d: layers.CenterCrop(3, 3)),
    "ContrastLimitedAdaptiveHistogramEqualization": _image(
        lambda d: layers.ContrastLimitedAdaptiveHistogramEqualization(
            **VALUES, tile_grid_size=(2, 2)
        )
    ),
    "ConvLSTM1D": ((IMAGE,), lambda d: layers.ConvLSTM1D(2, 2, return_sequences=flip(d))),
    "ConvLSTM2D": ((VOLUME,), lambda d: layers.ConvLSTM2D(2, 2, return_sequences=flip(d))),
    "Cropping1D": ((SEQUENCE,), lambda d: layers.Cropping1D(1)),
    "Cropping2D": _image(lambda d: layers.Cropping2D(1)),
    "Cropping3D": ((VOLUME,), lambda d: layers.Cropping3D(((1, 0), (0, 1), (0, 0)))),
    "CutMix": _image(lambda d: layers.CutMix()),
    "Dense": (
        (*ANY, VOLUME),
        lambda d: layers.Dense(
            pick(d, 2, 5), activation(d), use_bias=flip(d), kernel_regularizer=_penalty(d)
        ),
    ),
    "Dropout": (ANY, lambda d: layers.Dropout(pick(d, 0.0, 0.25, 0.5))),
    "ELU": (ANY, lambda d: layers.ELU()),
    "Flatten": (ANY, lambda d: layers.Flatten()),
    "GaussianDropout": (ANY, lambda d: layers.GaussianDropout(0.25)),
    "GaussianNoise": (ANY, lambda d: layers.GaussianNoise(0.25)),
    "GroupNormalization": (
        (SEQUENCE, IMAGE),
        lambda d: layers.GroupNormalization(1, scale=flip(d), center=flip(d)),
    ),
    "GRU": _recurrent("GRU"),
    "GRUCell": _cell(lambda d: layers.GRUCell(3, reset_after=flip(d))),
    "Identity": (ANY, lambda d: layers.Identity()),
    "LSTM": _recurrent("LSTM"),
    "LSTMCell": _cell(lambda d: layers.LSTMCell(2, unit_forget_bias=flip(d))),
    "LayerNormalization": (
        ANY,
        lambda d: layers.LayerNormalization(epsilon=1e-3, center=flip(d), scale=flip(d)),
    ),
    "LeakyReLU": (ANY, lambda d: layers.LeakyReLU(0.25)),
    "Masking": ((SEQUENCE,), lambda d: layers.Masking()),
    "MixUp": _image(lambda d: layers.MixUp(0.5)),
    "Normalization": (ANY, lambda d: layers.Normalization(mean=0.5, variance=2.0, invert=flip(d))),
    "PReLU": (ANY, lambda d: layers.PReLU("normal")),
    "Permute": ((SEQUENCE,), lambda d: layers.Permute((2, 1))),
    "Pipeline": _image(lambda d: _pipeline()),
    "RMSNormalization": (ANY, lambda d: layers.RMSNormalization(epsilon=1e-3)),
    "RNN": _cell(lambda d: layers.SimpleRNNCell(2, activation(d))),
    "RandAugment": _image(lambda d: in_float32(layers.RandAugment, **VALUES)),
    "RandomBrightness": _image(lambda d: layers.RandomBrightness(0.5, **VALUES)),
    "RandomColorDegeneration": _image(lambda d: layers.RandomColorDegeneration(0.5, **VALUES)),
    "RandomColorJitter": _image(
        lambda d: layers.RandomColorJitter(
            **VALUES, brightness_factor=0.5, contrast_factor=0.5, saturation_factor=0.5
        )
    ),
    "RandomContrast": _image(lambda d: layers.RandomContrast(0.5, **VALUES)),
    "RandomCrop": _image(lambda d: layers.RandomCrop(3, 3)),
    "RandomElasticTransform": _image(lambda d: layers.RandomElasticTransform(0.5, **VALUES)),
    "RandomErasing": _image(lambda d: layers.RandomErasing(0.5, **VALUES)),
    "RandomFlip": _image(lambda d: layers.RandomFlip()),
    "RandomGaussianBlur": _image(lambda d: layers.RandomGaussianBlur(0.5, **VALUES)),
    "RandomGrayscale": _image(lambda d: layers.RandomGrayscale(0.5)),
    "RandomHue": _image(lambda d: layers.RandomHue(0.5, **VALUES)),
    "RandomInvert": _image(lambda d: layers.RandomInvert(0.5, **VALUES)),
    "RandomPerspective": _image(lambda d: layers.RandomPerspective(0.5)),
    "RandomPosterization": _image(lambda d: layers.RandomPosterization(3, **VALUES)),
    "RandomRotation": _image(lambda d: layers.RandomRotation(0.25, dtype="float32")),
    "RandomSaturation": _image(lambda d: layers.RandomSaturation(0.5, **VALUES)),
    "RandomSharpness": _image(lambda d: layers.RandomSharpness(0.5, **VALUES)),
    "RandomShear": _image(lambda d: layers.RandomShear(0.25, 0.25)),
    "RandomTranslation": _image(lambda d: layers.RandomTranslation(0.25, 0.25)),
    "RandomZoom": _image(lambda d: layers.RandomZoom(0.25)),
    "ReLU": (ANY, lambda d: layers.ReLU(pick(d, None, 1.0), 0.25, pick(d, 0.0, 0.25))),
    "RepeatVector": ((FLAT,), lambda d: layers.RepeatVector(2)),
    "Rescaling": (ANY, lambda d: layers.Rescaling(0.5, 0.25)),
    "Resizing": _image(lambda d: layers.Resizing(4, 3, pick(d, "bilinear", "nearest", "bicubic"))),
    "SimpleRNN": _recurrent("SimpleRNN"),
    "SimpleRNNCell": _cell(lambda d: layers.SimpleRNNCell(2, dropout=0.25, recurrent_dropout=0.25)),
    "Softmax": (ANY, lambda d: layers.Softmax()),
    "Solarization": _image(lambda d: layers.Solarization(0.25, 0.5, value_range=(0.0, 1.0))),
    "SpatialDropout1D": ((SEQUENCE,), lambda d: layers.SpatialDropout1D(0.25)),
    "SpatialDropout2D": _image(lambda d: layers.SpatialDropout2D(0.25)),
    "SpatialDropout3D": ((VOLUME,), lambda d: layers.SpatialDropout3D(0.25)),
    "StackedRNNCells": _cell(
        lambda d: layers.StackedRNNCells([layers.LSTMCell(2), layers.GRUCell(2)])
    ),
    "TimeDistributed": (
        (SEQUENCE, IMAGE),
        lambda d: layers.TimeDistributed(pick(d, layers.Dense(2, "tanh"), layers.Dropout(0.25))),
    ),
    "UnitNormalization": (ANY, lambda d: layers.UnitNormalization()),
    "UpSampling1D": ((SEQUENCE,), lambda d: layers.UpSampling1D(2)),
    "UpSampling2D": _image(
        lambda d: layers.UpSampling2D(2, interpolation=pick(d, "nearest", "bilinear", "bicubic"))
    ),
    "UpSampling3D": ((VOLUME,), lambda d: layers.UpSampling3D((1, 2, 1))),
    "ZeroPadding1D": ((SEQUENCE,), lambda d: layers.ZeroPadding1D(1)),
    "ZeroPadding2D": _image(lambda d: layers.ZeroPadding2D(1)),
    "ZeroPadding3D": ((VOLUME,), lambda d: layers.ZeroPadding3D((1, 0, 0))),
}  # fmt: skip
# Layers that take pixels of three colours.
OF_COLOURS = {name for name, (ranks, _) in LAYERS.items() if ranks == (IMAGE,)} - {
    "ConvLSTM1D", "Cropping2D", "SpatialDropout2D", "UpSampling2D", "ZeroPadding2D",
}  # fmt: skip
for k, rank in enumerate((SEQUENCE, IMAGE, VOLUME), 1):
    LAYERS |= {
        f"Conv{k}D": _conv(f"Conv{k}D", rank),
        f"Conv{k}DTranspose": _conv(f"Conv{k}DTranspose", rank),
        f"MaxPooling{k}D": _pool(f"MaxPooling{k}D", rank),
        f"AveragePooling{k}D": _pool(f"AveragePooling{k}D", rank),
        f"GlobalMaxPooling{k}D": _global_pool(f"GlobalMaxPooling{k}D", rank),
        f"GlobalAveragePooling{k}D": _global_pool(f"GlobalAveragePooling{k}D", rank),
        f"AdaptiveMaxPooling{k}D": _adaptive(f"AdaptiveMaxPooling{k}D", rank),
        f"AdaptiveAveragePooling{k}D": _adaptive(f"AdaptiveAveragePooling{k}D", rank),
    }
    if k < 3:
        LAYERS |= {
            f"DepthwiseConv{k}D": _conv(f"DepthwiseConv{k}D", rank),
            f"SeparableConv{k}D": _conv(f"SeparableConv{k}D", rank),
        }


def _bins(x):
    return layers.Discretization([-0.5, 0.5])(x)


def _to_floats(x):
    return keras.ops.cast(x, keras.config.floatx())


def _attention(name):
    def call(x, d):
        attention = getattr(layers, name)(dropout=pick(d, 0.0, 0.25))
        return attention([x, beside(x)], use_causal_mask=flip(d))

    return (SEQUENCE,), call


def _multi_head(x, d):
    layer = layers.MultiHeadAttention(2, 2, dropout=pick(d, 0.0, 0.25), use_bias=flip(d))
    return layer(x, beside(x), use_causal_mask=flip(d))


def _group_query(x, d):
    return layers.GroupQueryAttention(2, 2, 1, use_bias=flip(d))(x, beside(x))


def _einsum(x, d):
    return layers.EinsumDense("abc,cd->abd", (x.shape[1], 2), bias_axes="d")(x)


def _concatenate(x, d):
    return layers.Concatenate(axis=pick(d, 1, -1))([x, beside(x)])


def _dot(x, d):
    return layers.Dot(axes=-1, normalize=flip(d))([x, beside(x)])


def _embedding(x, d):
    return layers.Embedding(NUM_WORDS, 3, mask_zero=flip(d))(x)


def _reversible_embedding(x, d):
    layer = layers.ReversibleEmbedding(NUM_WORDS, 3, tie_weights=flip(d))
    return layer(layers.Dense(3, "tanh")(layer(x)), reverse=True)


def _category_encoding(x, d):
    mode = pick(d, "multi_hot", "count")
    return _to_floats(layers.CategoryEncoding(NUM_WORDS, mode)(x))


def _discretization(x, d):
    return layers.Concatenate()([x, _to_floats(_bins(x))])


def _integer_lookup(x, d):
    words = layers.IntegerLookup(vocabulary=np.arange(1, NUM_WORDS))(x)
    return layers.Embedding(NUM_WORDS, 3)(words)


def _torch_module(x, d):
    import torch

    torch.manual_seed(int(d.integers(100)))
    dtype = getattr(torch, keras.config.floatx())
    module = torch.nn.Linear(x.shape[-1], 3).to(dtype)
    return layers.TorchModuleWrapper(module, output_shape=(None, 3))(x)


@keras.saving.register_keras_serializable("fuzzing")
def times_its_tanh(x):
    return x * keras.ops.tanh(x)


def _lambda(x, d):
    return layers.Lambda(times_its_tanh, output_shape=x.shape[1:])(x)


CALLS = {
    "Add": _merge("Add"),
    "AdditiveAttention": _attention("AdditiveAttention"),
    "Attention": _attention("Attention"),
    "Average": _merge("Average"),
    "CategoryEncoding": ((WORDS,), _category_encoding),
    "Concatenate": (ANY, _concatenate),
    "Discretization": ((FLAT,), _discretization),
    "Dot": ((FLAT, SEQUENCE), _dot),
    "EinsumDense": ((SEQUENCE,), _einsum),
    "Embedding": ((WORDS,), _embedding),
    "GroupQueryAttention": ((SEQUENCE,), _group_query),
    "IntegerLookup": ((WORDS,), _integer_lookup),
    "Lambda": (ANY, _lambda),
    "Maximum": _merge("Maximum"),
    "MelSpectrogram": (
        (FLAT,),
        lambda x, d: layers.MelSpectrogram(
            fft_length=4, sequence_stride=2, num_mel_bins=2, sampling_rate=80, dtype="float32"
        )(x),
    ),
    "Minimum": _merge("Minimum"),
    "MultiHeadAttention": ((SEQUENCE,), _multi_head),
    "Multiply": _merge("Multiply"),
    "Reshape": (ANY, lambda x, d: layers.Reshape((*x.shape[2:], x.shape[1]))(x)),
    "ReversibleEmbedding": ((WORDS,), _reversible_embedding),
    "STFTSpectrogram": (
        (FLAT,), lambda x, d: layers.STFTSpectrogram("magnitude", 4, 2)(x[..., None])
    ),
    "Subtract": _merge("Subtract"),
}  # fmt: skip
if BACKEND == "torch":
    CALLS["TorchModuleWrapper"] = (FLAT,), _torch_module
# Layers that plain Keras cannot train; the reasons are in `EXCLUDED`.
UNTRAINABLE = {
    "tensorflow": ("RandAugment",),
    "jax": ("IntegerLookup", "RandomCrop"),
    "torch": ("RandomBrightness", "RandomColorJitter", "RandomCrop"),
}[BACKEND]

# Layers that Keras computes in float32, wholly or in part, whatever the policy is.
IN_FLOAT32 = {
    "AdaptiveAveragePooling3D", "AdaptiveMaxPooling3D", "AugMix", "AveragePooling3D",
    "ContrastLimitedAdaptiveHistogramEqualization", "MaxPooling3D", "MelSpectrogram",
    "RandomRotation",
}  # fmt: skip

EXCLUDED = {
    "ConvLSTM3D": "takes tensors of six axes and seconds a step",
    "Equalization": "returns its input where Keras builds a graph, which is then none",
    "FlaxLayer": "needs flax",
    "HashedCrossing": "takes two columns of strings or integers, has no weights, gives integers",
    "Hashing": "has no weights and takes what no gradient passes through",
    "InputLayer": "is in every model",
    "IntegerLookup": "is TensorFlow's inside, which JAX cannot trace",
    "InputSpec": "is no layer",
    "JaxLayer": "is tested with JAX alone, in a function of the user's",
    "Layer": "is abstract",
    "MaxNumBoundingBoxes": "takes and gives bounding boxes",
    "RandAugment": "computes in `keras.config.floatx()` and fails in float64 on TensorFlow",
    "RandomBrightness": "changes its input in place on torch",
    "RandomColorJitter": "changes its input in place on torch",
    "RandomCrop": "does not crop on JAX and torch, where its output is taken to be cropped",
    "SpectralNormalization": "assigns its kernel in its call, which test_unusual_layers.py is for",
    "StringLookup": "takes strings",
    "TFSMLayer": "takes a SavedModel, whose variables Keras does not know",
    "TextVectorization": "takes strings",
    "TorchModuleWrapper": "is for torch alone",
    "Wrapper": "is abstract",
}

TABLE = {
    name: (ranks, lambda x, d, make=make: make(d)(x)) for name, (ranks, make) in LAYERS.items()
} | CALLS
for name in UNTRAINABLE:
    del TABLE[name]


def names_of_keras():
    """Return the first name of each class in `keras.layers`."""
    classes = {}
    for name in sorted(vars(layers)):
        if isinstance(getattr(layers, name), type):
            classes.setdefault(getattr(layers, name), []).append(name)
    return {names[0] if names[0] in TABLE else names[-1] for names in classes.values()}


NAMES = sorted(name for name in TABLE if hasattr(layers, name))
