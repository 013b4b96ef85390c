"""The compiled loss of a batch, with derivatives that survive convergence.

Keras clips probabilities to [1e-7, 1 - 1e-7], beyond which the loss has no derivatives. Given
logits, the second derivatives p_j (v_j - sum_k p_k v_k) cancel where a p_j is rounded to 1. With
logits z - max z they do not: there v_j is 0.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_infomcr.flatness.loss.logits import Logits
from keras_infomcr.flatness.loss.loss_of_each import computes_each, loss_of_each
from keras_infomcr.keras_internals import (
    FLAT_LOSSES,
    LOSS_ARGUMENTS,
    compile_loss,
    compute_loss,
    flat_losses,
    forget_loss_ids,
    known_logits,
    loss_arguments,
)
from keras_infomcr.objective.replaced import replaced


def build_compiled_loss(model: keras.Model, y: Any, outputs: Any):
    """Let Keras choose its loss functions by outputs, as it does in the first evaluation.

    It makes metrics too then, which must not be made while a framework traces.
    """
    known = compile_loss(model)
    if not _is_of_keras(model) or known.built:
        return
    if not keras.tree.is_nested(outputs):
        known.build(y, outputs)
        return
    build = known.build

    def build_and_stop(*of_one_form):
        build(*of_one_form)
        raise _Built

    # An evaluation brings the labels into the form of the outputs first, which `build` does not.
    with contextlib.suppress(_Built), replaced(known, "build", build_and_stop):
        known(y, outputs)


class _Built(Exception):
    """Ends an evaluation of which nothing but its beginning was wanted."""


def _is_of_keras(model: keras.Model) -> bool:
    return type(model).compute_loss is keras.Model.compute_loss


def compiled_loss(
    model: keras.Model,
    x: Any,
    y: Any,
    outputs: Any,
    logits: Logits,
    training: bool = False,
    of_example: bool = False,
) -> tuple[Any, list]:
    """Return the compiled loss of a batch, and of which outputs Keras clips the probabilities.

    Args:
        model: What bears the loss, as `resolved_loss` returns it.
        x: Structure of arrays `[B, ...]`.
        y: Structure of arrays `[B, ...]`.
        outputs: Structure of arrays `[B, ...]`, what the model makes of `x`.
        logits: `Logits` of that call.
        training: Boolean, as for the model's `call`.
        of_example: Boolean, whether to return the loss l of Fisher information: without label
            smoothing, `add_loss`, activity penalties and, of a single loss, its weight.

    Returns:
        Tuple of a scalar and a list of pairs: an output whose logits are not known, though its
        loss is a cross-entropy of probabilities, and `"categorical"` or `"binary"`.
    """

    def compute():
        return compute_loss(model, x, y, outputs, None, training=training)

    known = compile_loss(model)
    if not known.built:  # only a `compute_loss` of the user's can know by what to choose them
        compute()
    clipped, entries = [], flat_losses(known)
    if of_example:
        forget_loss_ids(model)  # by which Keras finds what `add_loss` has been given
        entries = _of_example(entries)
    entries = [e._replace(loss=_looking_behind(e.loss, logits, clipped)) for e in entries]
    with replaced(known, FLAT_LOSSES, entries):
        return compute(), clipped


def losses_by_example(model: keras.Model, y: Any, outputs: Any, logits: Logits) -> Any:
    """Return the losses of the examples of a batch, `[B]`: `compiled_loss` `of_example` of each.

    Args:
        model: A model whose losses `are_by_example`, or its stand-in.
        y: Structure of arrays `[B, ...]`.
        outputs: Structure of arrays `[B, ...]`.
        logits: `Logits` of the call that gave the outputs.
    """
    known = compile_loss(model)

    def of_each(loss, y_true, y_pred, sample_weight):
        return loss_of_each(loss, y_true, y_pred)

    entries = [
        e._replace(loss=_looking_behind(e.loss, logits, [], of_each))
        for e in _of_example(flat_losses(known))
    ]
    with replaced(known, FLAT_LOSSES, entries):
        return known(y, outputs)


def are_by_example(model: keras.Model, y: Any, outputs: Any) -> bool:
    """Return whether the loss of an example is known to depend on that example alone.

    Args:
        model: What bears the loss, as `resolved_loss` returns it, its losses chosen.
        y: Structure of arrays `[1, ...]`.
        outputs: Structure of arrays `[1, ...]`.
    """
    if not _is_of_keras(model):
        return False
    known, found = compile_loss(model), []

    def noting(loss):
        def note(y_true, y_pred, sample_weight=None):
            found.append(computes_each(loss, y_true, y_pred))
            return ops.zeros(())

        return note

    entries = [e._replace(loss=noting(e.loss)) for e in flat_losses(known)]
    with replaced(known, FLAT_LOSSES, entries):
        known(y, outputs)
    return all(found)


def _of_example(entries: list) -> list:
    """Return the losses without label smoothing and, of a single loss, its weight."""
    entries = [entry._replace(loss=_without_smoothing(entry.loss)) for entry in entries]
    return entries if len(entries) > 1 else [e._replace(loss_weights=None) for e in entries]


def _without_smoothing(loss: Any) -> Any:
    if not loss_arguments(loss).get("label_smoothing"):
        return loss
    return _with_arguments(loss, label_smoothing=0.0)


def _changed(loss: Any, **attributes) -> Any:
    """Return a copy of a loss with other attributes; `copy.copy` would serialise it."""
    changed = object.__new__(type(loss))
    changed.__dict__.update(loss.__dict__ | attributes)
    return changed


def _with_arguments(loss: Any, **arguments) -> Any:
    return _changed(loss, **{LOSS_ARGUMENTS: {**loss_arguments(loss), **arguments}})


def _looking_behind(
    loss: Any, logits: Logits, clipped: list, evaluate: Callable = lambda loss, *args: loss(*args)
) -> Callable:
    """Return what computes a loss of the logits where they are known, and else notes the output.

    `evaluate(loss, y_true, y_pred, sample_weight)` calls a loss of Keras.
    """
    function = getattr(loss, "fn", None)
    kinds = [(kind, on) for known, kind, on in _CROSS_ENTROPIES if known is function]
    # A subclass may make something else of the probabilities first.
    usual = type(loss).call is keras.losses.CategoricalCrossentropy.call

    def looking_behind(y_true, y_pred, sample_weight=None):
        from_logits = loss_arguments(loss).get("from_logits")
        # What an output of logits has noted, backends understand differently.
        if not usual or not kinds or (from_logits and known_logits(y_pred) is not None):
            return evaluate(loss, y_true, y_pred, sample_weight)
        kind, on_logits = kinds[0]
        known = y_pred if from_logits else _known_logits(loss, y_pred, kind, logits)
        if known is None:
            clipped.append((y_pred, kind))
            return evaluate(loss, y_true, y_pred, sample_weight)
        twin = _with_arguments(_changed(loss, fn=on_logits(function)), from_logits=True)
        call = twin.call
        twin.call = lambda y_true, _: call(y_true, ops.cast(known, twin.dtype))
        return evaluate(twin, y_true, y_pred, sample_weight)  # which takes the mask from the output

    return looking_behind


def _known_logits(loss: Any, y_pred: Any, kind: str, logits: Logits) -> Any:
    last = -1, len(y_pred.shape) - 1
    usual = kind == "binary" or loss_arguments(loss).get("axis", -1) in last
    return logits.of(y_pred, kind) if usual else None


def _softmax_cross_entropy(function: Callable) -> Callable:
    """Subtract the largest logit first: its own then is 0 exactly, and nothing cancels."""

    def of_logits(y_true, z, axis=-1, **kwargs):
        return function(y_true, z - ops.max(z, axis=axis, keepdims=True), axis=axis, **kwargs)

    return of_logits


def _sigmoid_cross_entropy(function: Callable) -> Callable:
    """Take the sigmoid cross-entropy as the softmax cross-entropy of the logits z and 0."""
    of_two = _softmax_cross_entropy(keras.losses.categorical_crossentropy)

    def of_logits(y_true, z, axis=-1, **kwargs):
        y_true = ops.cast(y_true, z.dtype)
        pairs = ops.stack([y_true, 1 - y_true], -1), ops.stack([z, ops.zeros_like(z)], -1)
        return ops.mean(of_two(*pairs, **kwargs), axis=axis)

    return of_logits


_CROSS_ENTROPIES = [
    (keras.losses.categorical_crossentropy, "categorical", _softmax_cross_entropy),
    (keras.losses.sparse_categorical_crossentropy, "categorical", _softmax_cross_entropy),
    (keras.losses.binary_crossentropy, "binary", _sigmoid_cross_entropy),
]
