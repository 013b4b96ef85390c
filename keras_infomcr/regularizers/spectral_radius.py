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
from keras_infomcr.regularizers.weights import cut, half_precision, refuse_float8
from keras_infomcr.scalars import times, to_shortest_float


@keras.saving.register_keras_serializable("keras_infomcr")
class SpectralRadius(Regularizer):
    """Penalise the spectral radius of the Hessian: the largest curvature, by its size.

    Training minimises

        L(B, w) + strength * max(0, rho - threshold),    rho = |lambda|,    H v = lambda v,

    with lambda the eigenvalue of largest size of the Hessian H of the batch's loss L(B, w) and v
    its eigenvector, of length 1. Where rho is above the threshold, a step adds

        strength * sign(lambda) * grad (v^T H v),    v held constant,

    to the training gradient. (The authors' code leaves out the sign, so that it drives |lambda| up
    where lambda is negative.) L is the compiled loss, with `add_loss` terms and without weight
    penalties, and all derivatives see the same dropout masks. They are computed in float32 at
    least, whatever the dtype policy. Kinks, as of ReLU, have no curvature.

    v is found by Lanczos iteration, from where the step before ended, until
    ||H v - lambda v|| <= tolerance * |lambda|, which leaves an error in lambda of the order of
    tolerance^2. v is another one for each batch, so that this takes 4 to 6 products H u, some two
    passes over the batch each; power iteration, as in the paper, takes a fifth more. A step that
    has not converged adds nothing, because its vector may belong to the other end of the spectrum,
    and the next one goes on from there.

    The gradient of v^T H v is taken by one more backward pass. The difference of gradients
    (g(w + h v) - 2 g(w) + g(w - h v)) / h^2, some two passes, is no substitute in float32: it was
    off by 0.2 % and more with GELU, and by far more with ReLU
    (`benchmarks/third_derivatives.py`).

    The logs show the means over the epoch of rho, `spectral_radius`, and of the share of steps that
    have not converged, from 0 to 1, `spectral_radius_unconverged`.

    Args:
        strength: Float, 0 or greater. The coefficient of the penalty; live. Defaults to 0.01.
        threshold: Float, 0 or greater. The spectral radius up to which there is no penalty. It is
            live: `model.regularizer.threshold = 5.0` takes effect with the next batch. Defaults
            to 0.
        max_products: Integer, at least 1. Products H u of a step at most. As many vectors of the
            size of all weights may be kept while a step is taken. On several replicas all of them
            are always computed. Defaults to 8.
        tolerance: Float, greater than 0. See above. Defaults to 0.1.
        num_examples: Integer, at least 1, or `None`. The Hessian is of the first examples of the
            batch, so many or, with `None`, all. Batch normalisation then sees these alone. Fewer
            examples cost less and vary more. Replicas share them. Defaults to `None`.
        seed: Integer from 0 to 2^31 - 1, or `None`, of the random vector that the first step
            starts from. Defaults to `None`: drawn as Keras's layers draw theirs, so that
            `keras.utils.set_random_seed` determines it.

    Attributes:
        threshold: The live threshold, a `keras.Variable`. Assign a float to change it.

    Raises:
        ValueError: If an argument is out of its range, or, in training, if weights are of half
            precision or layers are quantised to float8.

    Example:

    ```python
    model.compile("sgd", "mse", regularizer=SpectralRadius(strength=0.01, threshold=1.0))
    ```

    Reference: Sandler, Klabjan and Luo, "Non-convex Optimization with Spectral Radius
    Regularization", 2021 (https://arxiv.org/abs/2102.11210).
    """

    threshold = Live(validation.non_negative)
    further_logs = ("spectral_radius_unconverged",)

    def __init__(
        self,
        strength: float = 0.01,
        threshold: float = 0.0,
        max_products: int = 8,
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
        radius, sign = ops.abs(value), ops.sign(value)
        acts = ops.logical_and(converged, radius > ops.cast(self.threshold, radius.dtype))
        gradient = objective.curvature_gradient(weights, _cut(vector, weights), state, batch)
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
    """Return a vector as a list of arrays like the weights, in their dtypes."""
    return [ops.cast(part, w.dtype) for part, w in zip(cut(vector, weights), weights)]
