"""Evaluations without the penalties on weights (`kernel_regularizer` and the like)."""

import keras
from keras import ops

from keras_infomcr.objective.stand_ins import StandIn, evaluating, standing_in


def without_weight_penalties(model):
    """Return a context in which the penalties on the weights of a model are zero."""
    variables = [v for v in model.trainable_variables if v.regularizer is not None]
    return standing_in(variables, "regularizer", lambda variable: _Penalty(variable.regularizer))


class _Penalty(StandIn, keras.regularizers.Regularizer):
    """Stands in for a penalty."""

    def __init__(self, penalty):
        self.penalty = penalty

    def __call__(self, weight):
        return ops.zeros((), weight.dtype) if evaluating() else self.penalty(weight)
