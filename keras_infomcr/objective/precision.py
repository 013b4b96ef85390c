"""Evaluations in float32 whatever the dtype policy."""

import copy

import keras

from keras_infomcr.keras_internals import DTYPE_POLICY, all_layers, dtype_policy
from keras_infomcr.objective.stand_ins import StandIn, evaluating, standing_in

HALF_PRECISION = ("float16", "bfloat16")


def true_float32(model):
    """Return a context in which layers of mixed precision compute in float32."""
    layers = [
        layer
        for layer in all_layers(model)
        if isinstance(dtype_policy(layer), _TrueFloat32)
        or (layer.compute_dtype in HALF_PRECISION and layer.variable_dtype == "float32")
    ]
    return standing_in(layers, DTYPE_POLICY, _stand_in)


def scales_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    """Return whether the optimizer wants gradients of the loss times a scale."""
    dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    return dynamic or bool(getattr(optimizer, "loss_scale_factor", None))


def float8_scales(variables):
    """Return the paths of the scales that layers quantised to float8 keep among their weights.

    Their "gradients" are their new values.
    """
    return [v.path for v in variables if getattr(v, "overwrite_with_gradient", False)]


class _TrueFloat32(StandIn):
    """Stands in for a half-precision policy, which it is in all else."""

    @property
    def compute_dtype(self):
        return "float32" if evaluating() else self._compute_dtype


def _stand_in(layer):
    policy = copy.copy(layer.dtype_policy)
    policy.__class__ = type(type(policy).__name__, (_TrueFloat32, type(policy)), {})
    return policy
