"""Which models couple the examples of a batch."""

import keras
from keras import layers, losses

from keras_infomcr.keras_internals import all_layers, loss_arguments
from keras_infomcr.objective import HALF_PRECISION, is_mean_over_examples, losses_of

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

# Losses whose value for an example, and its weight in the mean, do not depend on other examples.
_LOSSES_BY_EXAMPLE = (
    losses.mean_squared_error, losses.mean_absolute_error, losses.mean_absolute_percentage_error,
    losses.mean_squared_logarithmic_error, losses.huber, losses.log_cosh, losses.hinge,
    losses.squared_hinge, losses.categorical_hinge, losses.kl_divergence, losses.poisson,
    losses.cosine_similarity, losses.binary_crossentropy, losses.binary_focal_crossentropy,
    losses.categorical_crossentropy, losses.categorical_focal_crossentropy,
    losses.sparse_categorical_crossentropy, losses.ctc,
)  # fmt: skip


def couples_no_examples(model: keras.Model) -> bool:
    """Return whether the model is known to couple no two examples of a batch in training.

    Known are Functional models of listed Keras layers with listed losses of Keras. Random layers
    are left out: slices would see other masks than the full batch does.
    """
    compiled_losses = [loss for loss in losses_of(model) if loss is not None]
    return (
        type(model).compute_loss is keras.Model.compute_loss
        and is_mean_over_examples(model)
        and all(map(_is_loss_by_example, compiled_losses))
        and _is_graph_of_known_layers(model)
        and not any(layer.activity_regularizer for layer in all_layers(model))
        and not any(layer.compute_dtype in HALF_PRECISION for layer in all_layers(model))
    )


def has_state_of_its_own(model: keras.Model) -> bool:
    """Return whether a layer is a torch module with buffers, which are no variables of Keras."""
    modules = [x for x in all_layers(model) if isinstance(x, layers.TorchModuleWrapper)]
    return any(True for layer in modules for _ in layer.module.buffers())


def _is_loss_by_example(loss):
    loss = losses.get(loss)
    arguments = loss_arguments(loss)
    return (
        getattr(loss, "fn", loss) in _LOSSES_BY_EXAMPLE
        and _is_of_keras(loss)
        # Labels of the ignored class take their weight from the others of the batch.
        and arguments.get("ignore_class") is None
        and _is_within_examples(arguments.get("axis", -1))
    )


def _is_within_examples(axes):
    return all(axis == -1 or axis > 0 for axis in keras.tree.flatten(axes))


def _is_graph_of_known_layers(model):
    """Return whether all operations of a model, nested ones included, are known."""
    if not _is_of_keras(type(model).call):
        return False
    if isinstance(model, keras.Sequential):
        return all(map(_is_known, model.layers))
    return hasattr(model, "operations") and all(map(_is_known, model.operations))


def _is_known(operation):
    if isinstance(operation, keras.Model):
        return _is_of_keras(type(operation)) and _is_graph_of_known_layers(operation)
    if type(operation) is layers.BatchNormalization:
        return not operation.trainable
    activation = getattr(operation, "activation", None)
    return (
        type(operation) in _BY_EXAMPLE
        and getattr(operation, "quantization_mode", None) is None
        and _is_within_examples(getattr(operation, "axis", -1))
        and (activation is None or _is_of_keras(activation))
    )


def _is_of_keras(definition):
    module = getattr(definition, "__module__", type(definition).__module__)
    return module.split(".")[0] == "keras"
