"""The penalties on weights (`kernel_regularizer` and the like), and evaluations without them."""

import keras
from keras import ops

from keras_infomcr import backend
from keras_infomcr.objective.stand_ins import StandIn, evaluating, standing_in


def without_weight_penalties(model):
    """Return a context in which the penalties on the weights of a model are zero."""
    variables = [v for v in model.trainable_variables if v.regularizer is not None]
    return standing_in(variables, "regularizer", lambda variable: _Penalty(variable.regularizer))


def penalty_and_gradients(variables: list, weights: list) -> tuple:
    """Return the sum of the penalties of variables at the given weights, and its gradients."""
    if not any(v.regularizer for v in variables):
        return 0.0, [None] * len(variables)

    def penalty(weights):
        terms = [ops.sum(v.regularizer(w)) for v, w in zip(variables, weights) if v.regularizer]
        return sum(terms), None

    (value, _), gradients = backend.value_and_grad(penalty)(weights)
    return value, gradients


class _Penalty(StandIn, keras.regularizers.Regularizer):
    """Stands in for a penalty."""

    def __init__(self, penalty):
        self.penalty = penalty

    def __call__(self, weight):
        return ops.zeros((), weight.dtype) if evaluating() else self.penalty(weight)
