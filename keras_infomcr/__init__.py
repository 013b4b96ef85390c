"""Flat minima for Keras 3: train towards them, and measure them, inside `model.fit`."""

# Not in `__all__`, where they would take the place of Keras's modules of the same names.
from keras_infomcr import callbacks as callbacks
from keras_infomcr import flatness as flatness
from keras_infomcr import layers as layers
from keras_infomcr import models as models
from keras_infomcr import regularizers as regularizers
from keras_infomcr.callbacks import GammaHatCallback, StartRegAfterLRDrop
from keras_infomcr.models import RegularizedModel
from keras_infomcr.version import __version__

__all__ = [
    "GammaHatCallback",
    "RegularizedModel",
    "StartRegAfterLRDrop",
    "__version__",
]
