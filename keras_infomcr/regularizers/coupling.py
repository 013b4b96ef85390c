"""Which models couple the examples of a batch."""

import keras
from keras import layers

from keras_infomcr.objective import HALF_PRECISION

# Layers that map each example by itself, draw no random numbers and make no masks.
_BY_EXAMPLE = (
    layers.InputLayer, layers.Identity, layers.Dense, layers.EinsumDense, layers.Activation,
    layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU, layers.Softmax, layers.Flatten,
    layers.Reshape, layers.Permute, layers.RepeatVector, layers.Rescaling, layers.Normalization,
    layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.DepthwiseConv1D, layers.DepthwiseConv2D,
    layers.SeparableConv1D, layers.SeparableConv2D, layers.Conv1DTranspose, layers.Conv2DTranspose,
    layers.Conv3DTranspose, layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D,
    layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D,
    layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
    layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D,
    layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D, layers.Cropping1D,
    layers.Cropping2D, layers.Cropping3D, layers.UpSampling1D, layers.UpSampling2D,
    layers.UpSampling3D, layers.LayerNormalization, layers.GroupNormalization,
    layers.UnitNormalization, layers.Add, layers.Subtract, layers.Multiply, layers.Average,
    layers.Maximum, layers.Minimum,
)  # fmt: skip


def is_mean_over_examples(model):
    """Return whether the compiled losses are means over the examples of the batch.

    Only then is L(B) = sum_i (b_i/B) L(B_i) for a model that maps each example by itself.
    """
    losses = [x for x in keras.tree.flatten(model.loss) if x is not None]
    reductions = {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}
    return reductions <= {"sum_over_batch_size", "mean"}


def maps_each_example_by_itself(model):
    """Return whether the model is known to couple no two examples of a batch in training.

    Known are Functional models of listed Keras layers, with Keras's own loss computation. Random
    layers are left out: slices would see other masks than the full batch does.
    """
    return (
        type(model).compute_loss is keras.Model.compute_loss
        and _is_graph_of_known_layers(model)
        and not any(layer.activity_regularizer for layer in model._flatten_layers())
        and not any(layer.compute_dtype in HALF_PRECISION for layer in model._flatten_layers())
    )


def has_state_by_example(model):
    """Return whether a recurrent layer carries a state for each example of the batch."""
    return any(getattr(layer, "stateful", False) for layer in model._flatten_layers())


def _is_graph_of_known_layers(model):
    """Return whether all operations of a Functional model, nested ones included, are known."""
    operations = getattr(model, "operations", None)
    return operations is not None and all(
        type(operation) in _BY_EXAMPLE
        or (isinstance(operation, layers.BatchNormalization) and not operation.trainable)
        or _is_plain_graph(operation)
        for operation in operations
    )


def _is_plain_graph(operation):
    plain = type(operation).__module__.startswith("keras.")
    return plain and isinstance(operation, keras.Model) and _is_graph_of_known_layers(operation)
