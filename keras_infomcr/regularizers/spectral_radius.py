"""A penalty on the spectral radius of the Hessian."""

import random
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend, validation
from keras_infomcr.core.host_generators import host_generators_kept
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers.dominant_eigenpair import dominant_eigenpair
from keras_infomcr.regularizers.live import Live
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.replicas import share_of_replica, warn_of_uneven_shares
from keras_infomcr.regularizers.weights import half_precision, refuse_float8
from keras_infomcr.scalars import times, to_shortest_float


@keras.saving.register_keras_serializable("keras_infomcr")
class SpectralRadius(Regularizer):
    threshold = Live(validation.non_negative)
    further_logs = ("spectral_radius_unconverged",)

    def __init__(
        self,
        strength: float = 0.01,
        threshold: float = 0.0,
        max_products: int = 10,
        tolerance: float = 0.1,
        num_examples: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(strength)
        self.threshold = threshold
        validation.integer(minimum=1, max_products=max_products)
        validation.positive(tolerance=tolerance)
        if num_examples is not None:
            validation.integer(minimum=1, num_examples=num_examples)
        if seed is not None:
            validation.integer(minimum=0, maximum=2**31 - 1, seed=seed)
        self.max_products = max_products
        self.tolerance = tolerance
        self.num_examples = num_examples
        self.seed = seed
        self._drawn_seed = random.randint(1, 10**9) if seed is None else int(seed)

    def check(self, model: keras.Model):
        """Warn of a number of examples that replicas cannot share evenly."""
        warn_of_uneven_shares(model, stacklevel=3, num_examples=self.num_examples)

    def build(self, variables: Sequence[keras.Variable]):
        """Refuse weights that do not fit, and draw the vector that the first step starts from."""
        halves = half_precision(variables)
        if halves:
            raise ValueError(
                "Weights must be float32 or float64: in half precision the derivatives of "
                f"gradients are lost. Received: half-precision weights {halves}. Use the dtype "
                'policy "mixed_float16" or "mixed_bfloat16".'
            )
        refuse_float8(variables)
        dtype = keras.backend.result_type(*(v.dtype for v in variables))
        size = sum(int(np.prod(v.shape)) for v in variables)
        start = np.random.default_rng(self._drawn_seed).standard_normal(size)
        start = (start / np.linalg.norm(start)).astype(dtype)
        self.memory = [keras.Variable(start, dtype=dtype, trainable=False, name="eigenvector")]

    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return the spectral radius and its gradient, and remember the eigenvector."""
        weights, state, (start,) = objective.weights(), objective.state(), memory
        batch = self._examples(batch, objective.model)
        with host_generators_kept():  # so that the last evaluation draws what this one draws
            of_weights = objective.hessian_product(weights, state, batch)

        def product(vector):
            products = objective.mean_over_replicas(of_weights(_cut(vector, weights)))
            return _joined(products, weights, vector.dtype)

        # Replicas cannot wait for each other in a branch.
        cond = backend.cond if backend.num_replicas(objective.model) == 1 else None
        value, vector, converged = dominant_eigenpair(
            backend.traced_once(product), start, self.tolerance, self.max_products, cond
        )
        radius = ops.abs(value)
        acts = ops.logical_and(converged, radius > ops.cast(self.threshold, radius.dtype))
        gradient = objective.curvature_gradient(weights, _cut(vector, weights), state, batch)
        sign = ops.sign(value)
        gradient = [None if g is None else ops.where(acts, times(sign, g), 0) for g in gradient]
        unconverged = ops.cast(ops.logical_not(converged), radius.dtype)
        logs = {"spectral_radius_unconverged": unconverged}
        return Step(radius, gradient, memory=[vector], logs=logs)

    def _examples(self, batch: Batch, model: keras.Model) -> Batch:
        """Return the examples that the Hessian is of."""
        if self.num_examples is None:
            return batch
        count, size = share_of_replica(self.num_examples, model), backend.batch_size(batch)
        count = min(count, size) if isinstance(size, int) else ops.minimum(count, size)
        return keras.tree.map_structure(
            lambda a: None if a is None else backend.slice_rows(a, 0, count), batch
        )

    def get_config(self) -> dict:
        """Return the constructor's arguments, the live ones at their present values."""
        return {
            "strength": to_shortest_float(self.strength),
            "threshold": to_shortest_float(self.threshold),
            "max_products": self.max_products,
            "tolerance": self.tolerance,
            "num_examples": self.num_examples,
            "seed": self.seed,
        }


def _joined(arrays: list, weights: list, dtype: str) -> Any:
    """Return a list of arrays like the weights as one vector, `None` being zeros."""
    parts = [ops.zeros_like(w) if a is None else a for a, w in zip(arrays, weights)]
    return ops.concatenate([ops.cast(ops.reshape(p, (-1,)), dtype) for p in parts])


def _cut(vector: Any, weights: list) -> list:
    """Return a vector as a list of arrays like the weights."""
    stops = np.cumsum([int(np.prod(w.shape)) for w in weights])
    parts = [vector[stop - int(np.prod(w.shape)) : stop] for stop, w in zip(stops, weights)]
    return [ops.cast(ops.reshape(p, w.shape), w.dtype) for p, w in zip(parts, weights)]
