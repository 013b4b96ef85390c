"""Which models couple the examples of a batch."""

import functools

import keras
from keras import layers, losses

from keras_infomcr import backend
from keras_infomcr.keras_internals import (
    all_layers,
    calls_of_graph,
    get_keras_mask,
    loss_arguments,
    parts_of,
)
from keras_infomcr.objective import (
    HALF_PRECISION,
    is_loss_by_example,
    is_mean_over_examples,
    losses_of,
)
from keras_infomcr.regularizers.operations_by_example import (
    is_elementwise,
    maps_by_example,
    within_examples,
)

# Layers that map each example by itself, as far as `_is_known` says.
_BY_EXAMPLE = frozenset(
    getattr(layers, name)
    for name in """
    InputLayer Identity Dense EinsumDense Embedding ReversibleEmbedding Activation ReLU LeakyReLU
    PReLU ELU Softmax Masking Flatten Reshape Permute RepeatVector Rescaling Normalization Resizing
    CenterCrop Conv1D Conv2D Conv3D DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D
    Conv1DTranspose Conv2DTranspose Conv3DTranspose MaxPooling1D MaxPooling2D MaxPooling3D
    AveragePooling1D AveragePooling2D AveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
    AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D AdaptiveMaxPooling1D
    AdaptiveMaxPooling2D AdaptiveMaxPooling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D
    Cropping2D Cropping3D UpSampling1D UpSampling2D UpSampling3D LayerNormalization
    RMSNormalization GroupNormalization UnitNormalization Add Subtract Multiply Average Maximum
    Minimum Concatenate Dot Attention AdditiveAttention MultiHeadAttention GroupQueryAttention
    TimeDistributed RNN Bidirectional SimpleRNN LSTM GRU ConvLSTM1D ConvLSTM2D ConvLSTM3D
    SimpleRNNCell LSTMCell GRUCell StackedRNNCells Dropout AlphaDropout GaussianDropout
    GaussianNoise SpatialDropout1D SpatialDropout2D SpatialDropout3D
    """.split()
    if hasattr(layers, name)  # older versions of Keras lack some
)
_OF_SINGLE_NUMBERS = frozenset(("InputLayer", "Embedding", "ReversibleEmbedding", "Reshape"))
# What makes a layer draw random numbers unless it is 0.
_RATES = ("rate", "stddev", "dropout", "recurrent_dropout")
_ACTIVATIONS = ("activation", "recurrent_activation")


def couples_no_examples(model: keras.Model) -> bool:
    """Return whether the model is known to couple no two examples of a batch in training.

    Known are Functional models of listed Keras layers and operations with listed losses of Keras.
    Random layers are left out: slices would see other masks than the full batch does.
    """
    compiled_losses = [loss for loss in losses_of(model) if loss is not None]
    return (
        all(map(_weighs_examples_alone, compiled_losses))
        and _trains_like_keras(model)
        and _is_known_graph(model, _is_known)
        and _adds_up_gradients(model)
    )


def is_its_own_slice(model: keras.Model) -> bool:
    """Return whether a pass over a batch is known to be the same as Keras's own training pass.

    Known are Functional models as for `couples_no_examples`, and besides with batch normalisation
    and all that couples the examples of a batch.
    """
    return (
        # Else Keras's pass sees more than what this replica has.
        backend.num_parallel_steps(model) == backend.num_replicas(model)
        and all(map(_is_reduced_by_keras, losses_of(model)))
        and not any(getattr(layer, "synchronized", False) for layer in all_layers(model))
        and _trains_like_keras(model)
        and _is_known_graph(model, _is_normalization_or_known)
        and _adds_up_gradients(model)
    )


def _trains_like_keras(model):
    """Return whether nothing but the compiled loss, in float32 at least, is trained on."""
    return (
        type(model).compute_loss is keras.Model.compute_loss
        and is_mean_over_examples(model)
        and not any(layer.activity_regularizer for layer in all_layers(model))
        and not any(layer.compute_dtype in HALF_PRECISION for layer in all_layers(model))
    )


def _adds_up_gradients(model):
    """Return whether repeated rows of a sparse gradient are to the optimizer as their sum is."""
    embeds = any(isinstance(layer, layers.Embedding) for layer in all_layers(model))
    if not embeds or not backend.has_sparse_gradients():
        return True
    optimizer = model.optimizer
    clipped = optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue
    return type(optimizer) is keras.optimizers.SGD and clipped == (None, None, None)


def has_state_of_its_own(model: keras.Model) -> bool:
    """Return whether a layer is a torch module with buffers, which are no variables of Keras."""
    modules = [x for x in all_layers(model) if isinstance(x, layers.TorchModuleWrapper)]
    return any(True for layer in modules for _ in layer.module.buffers())


def _is_reduced_by_keras(loss):
    """Return whether Keras divides the loss among replicas: a loss of a user's own may not be."""
    return not isinstance(loss, losses.Loss) or _is_of_keras(loss)


def _weighs_examples_alone(loss):
    """Return whether an example's value and its weight in the mean are the example's own."""
    return (
        is_loss_by_example(loss)
        and _is_of_keras(losses.get(loss))
        # Labels of the ignored class take their weight from the others of the batch.
        and loss_arguments(losses.get(loss)).get("ignore_class") is None
    )


def _is_known_graph(model, is_known):
    """Return whether all calls in a model's graph are known, and no loss sees a mask.

    A loss under a mask weighs an example by the rest of the batch.
    """
    calls = calls_of_graph(model) if _is_of_keras(type(model).call) else None
    return (
        calls is not None
        and all(_is_known_call(call, is_known) for call in calls)
        and not any(get_keras_mask(t) is not None or len(t.shape) < 2 for t in model.outputs)
    )


def _is_known_call(call, is_known):
    layer = call.operation
    if not isinstance(layer, keras.Layer):
        return maps_by_example(call)
    arguments = keras.tree.flatten(call.arguments)
    tensors = [a for a in arguments if isinstance(a, keras.KerasTensor)]
    masked = any(get_keras_mask(t) is not None for t in tensors)
    if isinstance(layer, keras.Model):
        # The symbolic tensors within do not have the masks that come from without.
        return _is_of_keras(type(layer)) and not masked and _is_known_graph(layer, is_known)
    least = 1 if type(layer).__name__ in _OF_SINGLE_NUMBERS else 2
    return (
        is_known(layer)
        and (layer.supports_masking or not masked)  # else an array may keep its mask unseen
        and all(len(t.shape) >= least for t in tensors)
        and all(map(_is_for_all_examples, arguments))
    )


def _is_for_all_examples(argument):
    """Return whether an argument is the same for each example, or a symbolic tensor."""
    if isinstance(argument, keras.KerasTensor) or getattr(argument, "shape", (0,))[:1] == (1,):
        return True
    return argument is None or isinstance(argument, (bool, str))


def _is_normalization_or_known(layer):
    return type(layer) is layers.BatchNormalization or _is_known(layer)


def _is_known(layer):
    """Return whether a layer, with all layers in it, maps each example by itself."""
    if isinstance(layer, keras.Model):
        return _is_of_keras(type(layer)) and _is_known_graph(layer, _is_known)
    if type(layer) is layers.BatchNormalization:
        return not layer.trainable
    of_kind = type(layer) in _BY_EXAMPLE or (
        type(layer).__name__ == "ConvLSTMCell" and _is_of_keras(type(layer))
    )
    return (
        of_kind
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "stateful", False)
        and not any(getattr(layer, name, 0) for name in _RATES)
        and _leaves_examples_apart(layer)
        and all(_is_known_activation(getattr(layer, name, None)) for name in _ACTIVATIONS)
        and all(map(_is_known, parts_of(layer)))
    )


def _leaves_examples_apart(layer):
    axes = [getattr(layer, name, -1) for name in ("axis", "axes")]
    if isinstance(layer, layers.MultiHeadAttention):
        axes.append(layer.get_config()["attention_axes"] or -1)
    if isinstance(layer, layers.EinsumDense):
        terms, result = layer.equation.split("->")
        data, kernel = terms.split(",")
        return data[0] == result[0] and data[0] not in kernel
    return within_examples(axes)


def _is_known_activation(activation):
    if isinstance(activation, keras.Layer):
        return _is_known(activation)
    if isinstance(activation, functools.partial):
        axis = activation.keywords.get("axis", -1)
        return (
            not activation.args and within_examples(axis) and _is_known_activation(activation.func)
        )
    of_keras = vars(keras.activations).values()
    return activation is None or activation in of_keras or is_elementwise(activation)


def _is_of_keras(definition):
    module = getattr(definition, "__module__", type(definition).__module__)
    return module.split(".")[0] == "keras"
