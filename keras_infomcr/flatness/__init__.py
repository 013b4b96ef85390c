"""Measures of how flat a minimum is: `f(model, x, y, ...) -> result`."""

from keras_infomcr.flatness.gamma_hat import GammaHat, gamma_hat

__all__ = ["GammaHat", "gamma_hat"]
