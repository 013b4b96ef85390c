"""Models that train towards flat minima."""

from keras_infomcr.models.regularized_model import RegularizedModel

__all__ = ["RegularizedModel"]
