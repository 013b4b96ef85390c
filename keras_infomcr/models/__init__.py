"""Models that train towards flat minima."""

from keras_infomcr.models.regularized_model import RegularizedModel, WrappedModel

__all__ = ["RegularizedModel", "WrappedModel"]
