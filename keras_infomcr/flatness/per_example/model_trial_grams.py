"""The `TrialGrams` of a model: chosen by its first examples, and kept as long as the model."""

from typing import Any

import keras
import numpy as np

from keras_infomcr.flatness.loss.compiled_loss import are_by_example, build_compiled_loss
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
    first = keras.tree.map_structure(lambda a: a[:1], y)
    build_compiled_loss(loss_bearer, first, outputs)
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
        or settings.examples_together < settings.num_examples
        or model.run_eagerly  # as models ask for that look at their numbers, of one example each
    )
    if other_loss and not one_by_one:
        with keras.StatelessScope():  # Keras counts the loss of each output in a metric
            values = ExampleLoss(loss_bearer, are_by_example(loss_bearer, first, outputs))
        one_by_one = not values.together
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

    def of_first_example(count, outputs, logits):
        inputs, of_examples = keras.tree.map_structure(
            lambda a: keras.ops.convert_to_tensor(a[:count]), (x, labels)
        )
        with keras.StatelessScope():
            found = values(inputs, of_examples, outputs, logits), *keras.tree.flatten(outputs)
        arrays = map(keras.ops.convert_to_numpy, found)
        return [np.atleast_1d(array)[0].astype("float64") for array in arrays]

    alone = of_first_example(1, *of_first)
    beside = of_first_example(2, *_predict(model, taps, x, 2))
    # Log-odds are numbers about 1. Losses may be of any size, and are as right as the outputs are.
    pairs = zip(alone, beside) if isinstance(values, ExampleLoss) else []
    return (
        taps.coupled()
        or not np.isclose(alone[0], beside[0], rtol=1e-3, atol=1e-3)
        or any(not np.allclose(b, a, rtol=0, atol=1e-3 * np.max(np.abs(a))) for a, b in pairs)
    )


def _predict(model: keras.Model, taps: Taps, x: Any, count: int) -> tuple[Any, Logits]:
    """Return outputs and logits of the first `count` examples, seen by the taps."""
    objective = Objective(model)
    x = keras.tree.map_structure(lambda a: a[:count], x)
    with objective.at(objective.weights(), objective.state(), False) as (predict, scope):
        with taps.noting(scope, count):
            return predict_with_logits(model, predict, x)
