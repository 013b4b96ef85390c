"""Whether the training gradient may be the mean of the sub-batch gradients."""

import keras

from keras_infomcr.objective import is_mean_over_examples
from keras_infomcr.regularizers import coupling


def is_mean_of_sub_batches(main_gradient: str, model: keras.Model) -> bool:
    """Return whether the sub-batches give the training gradient, too.

    Args:
        main_gradient: As for `SubBatchPerturbation`.
        model: The model as compiled.

    Raises:
        ValueError: If `main_gradient="sub_batches"` and the model must see whole batches.
    """
    if main_gradient == "auto":
        return coupling.couples_no_examples(model)
    if main_gradient == "full_batch":
        return False
    if not is_mean_over_examples(model):
        raise ValueError(
            "The loss must be a mean over the examples where the training gradient is the "
            'mean over sub-batches. Received: main_gradient="sub_batches" and '
            f'loss={model.loss!r}. Use `main_gradient="full_batch"`.'
        )
    if coupling.has_state_of_its_own(model):
        raise ValueError(
            "Torch modules with buffers, such as batch normalisation, must see whole batches. "
            'Received: main_gradient="sub_batches". Use `main_gradient="full_batch"`.'
        )
    return True
