"""Measures of how flat a minimum is: `f(model, x, y, ...) -> result`."""

from keras_infomcr.flatness import plot
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.fisher.fisher_rao_norm import fisher_rao_norm
from keras_infomcr.flatness.fisher.frobenius_norm import fisher_frobenius_norm
from keras_infomcr.flatness.fisher.gamma import Gamma, gamma
from keras_infomcr.flatness.fisher.gamma_hat import GammaHat, gamma_hat
from keras_infomcr.flatness.fisher.gamma_hat_by_layer import GammaHatByLayer, gamma_hat_by_layer
from keras_infomcr.flatness.fisher.spectral_radius import fisher_spectral_radius
from keras_infomcr.flatness.fisher.trace import fisher_trace
from keras_infomcr.flatness.hessian.frobenius_norm import hessian_frobenius_norm
from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.relative_flatness import relative_flatness
from keras_infomcr.flatness.hessian.results import (
    HessianTraceByLayer,
    SpectralDensity,
    SpectralRadius,
    TopEigenvalues,
)
from keras_infomcr.flatness.hessian.spectral_density import hessian_spectral_density
from keras_infomcr.flatness.hessian.spectral_radius import hessian_spectral_radius
from keras_infomcr.flatness.hessian.top_eigenvalues import hessian_top_eigenvalues
from keras_infomcr.flatness.hessian.trace import hessian_trace
from keras_infomcr.flatness.hessian.trace_by_layer import hessian_trace_by_layer
from keras_infomcr.flatness.input_jacobian import input_jacobian_norm
from keras_infomcr.flatness.neighbourhood.adaptive_sharpness import adaptive_sharpness
from keras_infomcr.flatness.neighbourhood.average_adaptive_sharpness import (
    average_adaptive_sharpness,
)
from keras_infomcr.flatness.neighbourhood.local_energy import LocalEnergy, local_energy
from keras_infomcr.flatness.neighbourhood.local_entropy import local_entropy
from keras_infomcr.flatness.neighbourhood.local_entropy_gradient_norm import (
    local_entropy_gradient_norm,
)
from keras_infomcr.flatness.neighbourhood.local_learning_coefficient import (
    local_learning_coefficient,
)
from keras_infomcr.flatness.neighbourhood.pac_bayes_bound import PacBayesBound, pac_bayes_bound
from keras_infomcr.flatness.reestimate_batch_norm import reestimate_batch_norm
from keras_infomcr.flatness.surface.loss_between import LossBetween, loss_between
from keras_infomcr.flatness.surface.loss_surface import LossSurface, loss_surface

__all__ = [
    "Estimate",
    "Gamma",
    "GammaHat",
    "GammaHatByLayer",
    "Hessian",
    "HessianTraceByLayer",
    "LocalEnergy",
    "LossBetween",
    "LossSurface",
    "PacBayesBound",
    "SpectralDensity",
    "SpectralRadius",
    "TopEigenvalues",
    "adaptive_sharpness",
    "average_adaptive_sharpness",
    "fisher_frobenius_norm",
    "fisher_rao_norm",
    "fisher_spectral_radius",
    "fisher_trace",
    "gamma",
    "gamma_hat",
    "gamma_hat_by_layer",
    "hessian_frobenius_norm",
    "hessian_spectral_density",
    "hessian_spectral_radius",
    "hessian_top_eigenvalues",
    "hessian_trace",
    "hessian_trace_by_layer",
    "input_jacobian_norm",
    "local_energy",
    "local_entropy",
    "local_entropy_gradient_norm",
    "local_learning_coefficient",
    "loss_between",
    "loss_surface",
    "pac_bayes_bound",
    "plot",
    "reestimate_batch_norm",
    "relative_flatness",
]
