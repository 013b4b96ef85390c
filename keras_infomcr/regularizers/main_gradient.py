"""Whether the training gradient may be the mean of the sub-batch gradients."""

import keras

from keras_infomcr.regularizers import coupling
from keras_infomcr.regularizers.replicas import share_of_replica
from keras_infomcr.regularizers.whole_batches import refuse_if_uncuttable

# How errors name what was asked for, and what to do.
SUB_BATCHES = 'main_gradient="sub_batches"'
FULL_BATCH = 'Use `main_gradient="full_batch"`.'


def is_mean_of_sub_batches(main_gradient: str, model: keras.Model, num_sub_batches: int) -> bool:
    """Return whether the sub-batches give the training gradient, too.

    Args:
        main_gradient: As for `SubBatchPerturbation`.
        model: The model as compiled.
        num_sub_batches: As for `SubBatchPerturbation`.

    Raises:
        ValueError: If `main_gradient="sub_batches"` and the model must see whole batches.
    """
    if main_gradient == "auto":
        whole = share_of_replica(num_sub_batches, model) == 1
        return coupling.couples_no_examples(model) or (whole and coupling.is_its_own_slice(model))
    if main_gradient == "full_batch":
        return False
    refuse_if_uncuttable(model, SUB_BATCHES, FULL_BATCH)
    return True
