"""Every private name of Keras that the package uses, each in one place, with the reason.

All are unchanged from Keras 3.10 to 3.15, and Keras's own training step uses most of them too. When
a new version of Keras changes one, this is the file to change. (Besides,
`keras_infomcr.backend.tensorflow.trainer` overrides two private methods, which it names.)

* `Functional`: the class of a model made of inputs and outputs, which is not exported. Ours derives
  from it.
* `get_keras_mask`, `set_keras_mask`: Keras keeps a mask as an attribute of an array, which slices,
  copies, graphs and loops do not pass on.
* `in_stateless_scope`: whether variables are read from a scope of this thread.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.models.functional import Functional

__all__ = [
    "DTYPE_POLICY",
    "FLAT_LOSSES",
    "LOSS_ARGUMENTS",
    "Functional",
    "additional_loss",
    "all_layers",
    "call_has_training_arg",
    "calls_of_graph",
    "compile_loss",
    "compute_loss",
    "distribute_strategy",
    "dtype_policy",
    "flat_losses",
    "forget_loss_ids",
    "get_keras_mask",
    "in_stateless_scope",
    "is_rematerialized",
    "known_logits",
    "loss_arguments",
    "loss_tracker",
    "losses_of_step",
    "note_logits",
    "operation_name",
    "own_metrics",
    "parts_of",
    "set_call_has_training_arg",
    "set_keras_mask",
    "steps_shown",
    "symbolic_build",
    "value_held",
    "without_compile_config",
]

# The names of attributes that are replaced while an evaluation runs. The public setter of the dtype
# policy would write into a `DTypePolicyMap` that layers share, and would quantise; the other two
# have no setter.
DTYPE_POLICY = "_dtype_policy"
FLAT_LOSSES = "_flat_losses"
LOSS_ARGUMENTS = "_fn_kwargs"


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """Return the model and all layers in it, nested ones included.

    `model.layers` lists the first level alone, and not the layers that a layer holds.
    """
    return list(model._flatten_layers())


def parts_of(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that a layer holds itself, such as the projections of an attention."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


class Call(NamedTuple):
    """A call of a layer or operation in the graph of a model.

    Attributes:
        operation: The layer or operation.
        arguments: List of its arguments, structures of symbolic tensors and others.
        outputs: List of symbolic tensors.
    """

    operation: Any
    arguments: list
    outputs: list


def calls_of_graph(model: keras.Model) -> list[Call] | None:
    """Return the calls in the graph that a model runs, `None` if it is not known as a graph."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, Functional):
        return None
    return [
        Call(n.operation, [*n.arguments.args, *n.arguments.kwargs.values()], n.outputs)
        for n in keras.tree.flatten(model._nodes_by_depth)
    ]


def operation_name(operation: Any) -> str | None:
    """Return the name of an operation of `keras.ops`, such as "Add", `None` for all else."""
    of_ops = type(operation).__module__.startswith("keras.src.ops.")
    return type(operation).__name__ if of_ops else None


def call_has_training_arg(model: keras.Model) -> bool:
    """Return whether Keras passes `training` to the model's `call`, which it may not take."""
    return model._call_has_training_arg


def set_call_has_training_arg(model: keras.Model, value: bool) -> None:
    """Let Keras pass `training` to the model's `call`, or not, whatever its signature says."""
    model._call_has_training_arg = value


def compute_loss(model: keras.Model, x, y, y_pred, sample_weight, training: bool = True) -> Any:
    """Return the model's loss, by a user's `compute_loss` with or without `training`, too."""
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Return the mean of the loss that `fit` logs: a training step must update it."""
    return model._loss_tracker


def own_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Return the metrics that are attributes of the model, without what `compile` has made."""
    return model._metrics


def compile_loss(model: keras.Model) -> Any:
    """Return the object that computes the loss given to `compile`, for all outputs."""
    return model._compile_loss


def additional_loss(model: keras.Model, loss: Any) -> Any:
    """Return a loss that is not of `compile`, divided as Keras does under a strategy."""
    return model._aggregate_additional_loss(loss)


def losses_of_step(model: keras.Model) -> list:
    """Return what JAX's step has kept of `model.losses`, empty elsewhere."""
    return model._losses_override


def flat_losses(compile_loss: Any) -> list:
    """Return the losses of the outputs, with their weights, once it is built."""
    return compile_loss._flat_losses or []


def loss_arguments(loss: Any) -> dict[str, Any]:
    """Return all arguments of a loss's function: there is no other place that has them all."""
    return getattr(loss, "_fn_kwargs", {})


def known_logits(output: Any) -> Any:
    """Return the logits that an activation has noted on its output, `None` if it has not."""
    return getattr(output, "_keras_logits", None)


def note_logits(output: Any, logits: Any) -> None:
    """Note logits on an output, as the activation does: TensorFlow's cross-entropies use them."""
    output._keras_logits = logits


def dtype_policy(layer: keras.Layer) -> Any:
    """Return the dtype policy that the layer holds itself, not one taken out of a map."""
    return layer._dtype_policy


def forget_loss_ids(model: keras.Model) -> None:
    """Make Keras take every loss that layers add for a new one.

    It knows what the last call of a layer has added by `id`, which a new object may have got.
    """
    for layer in all_layers(model):
        layer._loss_ids.clear()


def is_rematerialized(layer: keras.Layer) -> bool:
    """Return whether `keras.RematScope` has a layer computed anew in the backward pass."""
    return getattr(layer, "_remat_mode", None) is not None


def symbolic_build(model: keras.Model, data_batch: tuple) -> None:
    """Build the layers of the model, and what `compile` was given, without computing anything."""
    model._symbolic_build(data_batch=data_batch)


@contextlib.contextmanager
def without_compile_config(model: keras.Model) -> Iterator[None]:
    """Let `keras.models.clone_model` make a copy that is not compiled."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def distribute_strategy(model: keras.Model) -> Any:
    """Return the `tf.distribute.Strategy` that the model was made in, or `None`.

    The public attribute has TensorFlow's default strategy in place of `None`. TensorFlow only.
    """
    return model._distribute_strategy


def value_held(variable: keras.Variable) -> Any:
    """Return the array that the variable holds, whatever value a scope gives it."""
    return variable._value


def steps_shown(progress_bar: keras.utils.Progbar) -> int:
    """Return how far a progress bar has come."""
    return progress_bar._seen_so_far
