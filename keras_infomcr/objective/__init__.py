"""A Keras model as a pure function of its weights."""

from keras_infomcr.objective.batch import Batch, joined
from keras_infomcr.objective.losses_by_example import is_loss_by_example
from keras_infomcr.objective.objective import Objective, copied
from keras_infomcr.objective.precision import HALF_PRECISION, float8_scales, scales_loss
from keras_infomcr.objective.reductions import is_mean_over_examples, losses_of
from keras_infomcr.objective.weight_penalties import penalty_and_gradients

__all__ = [
    "HALF_PRECISION",
    "Batch",
    "Objective",
    "copied",
    "float8_scales",
    "is_loss_by_example",
    "is_mean_over_examples",
    "joined",
    "losses_of",
    "penalty_and_gradients",
    "scales_loss",
]
