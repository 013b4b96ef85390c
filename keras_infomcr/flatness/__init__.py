"""Measures of how flat a minimum is: `f(model, x, y, ...) -> result`."""

from keras_infomcr.flatness import plot
from keras_infomcr.flatness.gamma import Gamma, gamma
from keras_infomcr.flatness.gamma_hat import GammaHat, gamma_hat
from keras_infomcr.flatness.gamma_hat_by_layer import GammaHatByLayer, gamma_hat_by_layer

__all__ = [
    "Gamma",
    "GammaHat",
    "GammaHatByLayer",
    "gamma",
    "gamma_hat",
    "gamma_hat_by_layer",
    "plot",
]
