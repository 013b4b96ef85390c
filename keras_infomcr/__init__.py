"""Flat minima for Keras 3: train towards them, and measure them, inside `model.fit`."""

from keras_infomcr import callbacks, flatness, layers, models, regularizers
from keras_infomcr.callbacks import GammaHatCallback, StartRegAfterLRDrop
from keras_infomcr.models import RegularizedModel
from keras_infomcr.version import __version__

__all__ = [
    "GammaHatCallback",
    "RegularizedModel",
    "StartRegAfterLRDrop",
    "__version__",
    "callbacks",
    "flatness",
    "layers",
    "models",
    "regularizers",
]
