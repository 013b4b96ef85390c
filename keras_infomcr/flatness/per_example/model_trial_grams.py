"""The `TrialGrams` of a model: chosen by its first examples, and kept as long as the model."""

from typing import Any

import keras
import numpy as np

from keras_infomcr.flatness.loss.compiled_loss import build_compiled_loss
from keras_infomcr.flatness.loss.example_values import ExampleLoss, example_values
from keras_infomcr.flatness.loss.logits import Logits, predict_with_logits
from keras_infomcr.flatness.per_example.taps import Taps
from keras_infomcr.flatness.per_example.trial_grams import TrialGrams
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.labels import check_labels
from keras_infomcr.objective import Objective


def model_trial_grams(
    model: keras.Model, loss_bearer: keras.Model, x: Any, y: Any, settings: TrialSettings
) -> TrialGrams:
    """Return what computes the Gram matrices of trials, compiled once for data of this form.

    Args:
        model: A built `keras.Model`.
        loss_bearer: What `resolved_loss` returns for the model.
        x: Structure of NumPy arrays `[N, ...]`.
        y: Structure of NumPy arrays `[N, ...]`, the labels.
        settings: `TrialSettings`.

    Raises:
        ValueError: If the labels do not fit the loss, or the settings do not.
    """
    # Not the number of examples in the data, which may be others in the next call.
    form = keras.tree.map_structure(lambda a: f"{a.dtype}{a.shape[1:]}", (x, y))
    key = "trial_grams", repr(form), settings.compiled_key, loss_bearer
    return compiled_for(model, key, lambda: _make(model, loss_bearer, x, y, settings))


def _make(
    model: keras.Model, loss_bearer: keras.Model, x: Any, y: Any, settings: TrialSettings
) -> TrialGrams:
    taps = Taps(model)
    outputs, logits = _predict(model, taps, x, 1)
    # Here already, for the labels of the first two examples are evaluated below.
    check_labels(loss_bearer, y, outputs)
    build_compiled_loss(loss_bearer, y, outputs)
    normalization = settings.normalize_softmax, settings.softmax_scale
    values = example_values(loss_bearer, outputs, logits, *normalization)
    labels = values.labels(y, outputs)
    other_loss = isinstance(values, ExampleLoss)
    if settings.training and other_loss:
        raise ValueError(
            "`training` must be `False` unless the loss is a cross-entropy of one output. "
            f"Received: training=True and loss={loss_bearer.loss!r}"
        )
    one_by_one = (
        settings.training
        or other_loss  # Keras makes one number of the losses of all examples
        or settings.examples_together < settings.num_examples
        or model.run_eagerly  # as models ask for that look at their numbers, of one example each
    )
    if one_by_one or _couples_examples(model, taps, x, labels, values, (outputs, logits)):
        taps.drop_all()
    taps.forget_evaluations()
    return TrialGrams(model, values, outputs, taps, settings)


def _couples_examples(
    model: keras.Model,
    taps: Taps,
    x: Any,
    labels: Any,
    values: Any,
    of_first: tuple[Any, Logits],
) -> bool:
    """Return whether an example's value depends on the one beside it, as with batch norm."""
    if len(keras.tree.flatten(x)[0]) == 1:
        return False

    def value_of_first(count, outputs, logits):
        inputs, of_examples = keras.tree.map_structure(
            lambda a: keras.ops.convert_to_tensor(a[:count]), (x, labels)
        )
        return keras.ops.convert_to_numpy(values(inputs, of_examples, outputs, logits))[0]

    alone = value_of_first(1, *of_first)
    beside = value_of_first(2, *_predict(model, taps, x, 2))
    return taps.coupled() or not np.isclose(alone, beside, rtol=1e-3, atol=1e-3)


def _predict(model: keras.Model, taps: Taps, x: Any, count: int) -> tuple[Any, Logits]:
    """Return outputs and logits of the first `count` examples, seen by the taps."""
    objective = Objective(model)
    x = keras.tree.map_structure(lambda a: a[:count], x)
    with objective.at(objective.weights(), objective.state(), False) as (predict, scope):
        with taps.noting(scope, count):
            return predict_with_logits(model, predict, x)
