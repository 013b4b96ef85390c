"""Models that train towards flat minima."""

from keras_infomcr.models.regularized_model import RegularizedModel, WrappedModel
from keras_infomcr.models.replicated_model import ReplicatedModel

__all__ = ["RegularizedModel", "ReplicatedModel", "WrappedModel"]
