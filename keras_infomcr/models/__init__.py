"""Models that train towards flat minima."""

from keras_infomcr.models.regularized_model import RegularizedModel
from keras_infomcr.models.wrapped_model import WrappedModel

__all__ = ["RegularizedModel", "WrappedModel"]
