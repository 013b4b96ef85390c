"""Callbacks that measure flatness, steer regularisers and average weights in `fit`."""

from keras_infomcr.callbacks.flatness_callback import FlatnessCallback
from keras_infomcr.callbacks.gamma_hat_callback import GammaHatCallback
from keras_infomcr.callbacks.regularization_schedule import RegularizationSchedule
from keras_infomcr.callbacks.sharpness_callback import SharpnessCallback
from keras_infomcr.callbacks.start_reg_after_lr_drop import StartRegAfterLRDrop
from keras_infomcr.callbacks.start_reg_in_late_phase import StartRegInLatePhase
from keras_infomcr.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "FlatnessCallback",
    "GammaHatCallback",
    "RegularizationSchedule",
    "SharpnessCallback",
    "StartRegAfterLRDrop",
    "StartRegInLatePhase",
    "WeightAveraging",
]
