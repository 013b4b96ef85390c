"""What may be passed as `RegularizedModel.compile(regularizer=...)`."""

import keras

from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.regularizers.entropy_sgd import EntropySGD
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.sharpness_aware import SharpnessAware
from keras_infomcr.regularizers.spectral_radius import SpectralRadius
from keras_infomcr.regularizers.sub_batch_perturbation import SubBatchPerturbation
from keras_infomcr.regularizers.weight_noise import WeightNoise

__all__ = [
    "EntropySGD",
    "Evaluation",
    "Regularizer",
    "SharpnessAware",
    "SpectralRadius",
    "Step",
    "SubBatchPerturbation",
    "WeightNoise",
    "get",
]

_BY_NAME = {
    "entropy_sgd": EntropySGD,
    "sharpness_aware": SharpnessAware,
    "spectral_radius": SpectralRadius,
    "sub_batch_perturbation": SubBatchPerturbation,
    "weight_noise": WeightNoise,
}


def get(identifier):
    """Return a regulariser from a name, an instance, its serialised form or `None`.

    Args:
        identifier: A name (`"sub_batch_perturbation"`), a `Regularizer`, what
            `keras.saving.serialize_keras_object` made of one, or `None`.

    Returns:
        A `Regularizer`, or `None`.

    Raises:
        ValueError: If it is none of these.
    """
    if identifier is None or isinstance(identifier, Regularizer):
        return identifier
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    found = identifier
    if isinstance(identifier, dict):
        found = keras.saving.deserialize_keras_object(identifier)
        if isinstance(found, Regularizer):
            return found
    is_class = isinstance(found, type) and issubclass(found, Regularizer)
    raise ValueError(
        f"`regularizer` must be a `Regularizer` instance, `None` or one of {sorted(_BY_NAME)}. "
        f"Received: regularizer={identifier!r} (of type {type(identifier)})"
        + (f". Pass an instance of the class, `{found.__name__}(...)`." if is_class else "")
    )
