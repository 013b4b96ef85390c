"""Pictures of the results of measures. They need matplotlib."""

from keras_infomcr.flatness.plot.histories import gamma_hat
from keras_infomcr.flatness.plot.layers import by_layer
from keras_infomcr.flatness.plot.noise import local_energy
from keras_infomcr.flatness.plot.over_training import sharpness
from keras_infomcr.flatness.plot.spectra import spectral_density
from keras_infomcr.flatness.plot.surfaces import loss_between, loss_surface

__all__ = [
    "by_layer",
    "gamma_hat",
    "local_energy",
    "loss_between",
    "loss_surface",
    "sharpness",
    "spectral_density",
]
