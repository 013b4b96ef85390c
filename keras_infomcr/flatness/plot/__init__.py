"""Pictures of the results of measures. They need matplotlib."""

from keras_infomcr.flatness.plot.histories import gamma_hat
from keras_infomcr.flatness.plot.layers import by_layer
from keras_infomcr.flatness.plot.noise import local_energy
from keras_infomcr.flatness.plot.spectra import spectral_density

__all__ = ["by_layer", "gamma_hat", "local_energy", "spectral_density"]
