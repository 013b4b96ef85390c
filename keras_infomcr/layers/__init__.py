"""Layers."""

from keras_infomcr.layers.logit_normalization import LogitNormalization

__all__ = ["LogitNormalization"]
