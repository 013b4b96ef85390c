"""Pictures of the results of measures. They need matplotlib."""

from keras_infomcr.flatness.plot.layers import by_layer
from keras_infomcr.flatness.plot.over_training import sharpness
from keras_infomcr.flatness.plot.spectra import spectral_density

__all__ = ["by_layer", "sharpness", "spectral_density"]
