"""Models whose training pass a rule cannot make in place of Keras."""

from typing import Any

import keras

from keras_infomcr.objective import Objective, is_mean_over_examples
from keras_infomcr.regularizers import coupling


def refuse_if_uncuttable(model: keras.Model, received: str, advice: str):
    """Refuse a model that must see whole batches where its slices give the training gradient.

    Args:
        model: The model as compiled.
        received: The argument that asks for slices, as it is written.
        advice: What to do, a sentence.
    """
    if not is_mean_over_examples(model):
        raise ValueError(
            "The loss must be a mean over the examples where the training gradient is the "
            f"mean over sub-batches. Received: {received} and loss={model.loss!r}. {advice}"
        )
    if coupling.has_state_of_its_own(model):
        raise ValueError(
            "Torch modules with buffers, such as batch normalisation, must see whole batches. "
            f"Received: {received}. {advice}"
        )


def refuse_module_buffers(model: keras.Model, rule: Any):
    """Refuse torch modules whose statistics a rule that replaces Keras's pass could not move."""
    if coupling.has_state_of_its_own(model):
        raise ValueError(
            "Torch modules must have no buffers, such as those of batch normalisation, which "
            "move in Keras's own pass alone. Received: a model with a `TorchModuleWrapper` "
            f"that has some, and regularizer={rule!r}. Use layers of Keras."
        )


def refuse_rewritten(objective: Objective, received: str, advice: str):
    """Refuse layers that assign their own trainable weights, which no evaluation may change.

    Args:
        objective: The `Objective`, evaluated.
        received: As for `refuse_if_uncuttable`.
        advice: As for `refuse_if_uncuttable`.
    """
    if objective.rewritten:
        raise ValueError(
            "Layers that assign their own trainable weights when they are called must see "
            f"whole batches. Received: {received} and layers that assign "
            f"{sorted(objective.rewritten)}. {advice}"
        )
