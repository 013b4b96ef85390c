"""Sharpness-aware minimisation and its family."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend, validation
from keras_infomcr.core.sub_batch_averages import (
    Contribution,
    accumulate,
    average,
    paired_evaluations,
)
from keras_infomcr.objective import Batch, Objective, joined
from keras_infomcr.regularizers import coupling
from keras_infomcr.regularizers.live import Live
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.replicas import share_of_replica, warn_of_uneven_shares
from keras_infomcr.regularizers.weights import half_precision, norm, refuse_float8
from keras_infomcr.regularizers.whole_batches import refuse_if_uncuttable, refuse_rewritten
from keras_infomcr.scalars import times, to_shortest_float

_DECAY = 0.9  # of the running mean of gradients that Friendly-SAM subtracts


@keras.saving.register_keras_serializable("keras_infomcr")
class SharpnessAware(Regularizer):
    """Follow the gradient at the worst weights nearby: SAM, ASAM, m-SAM and their relatives.

    With g the gradient of the loss L(B, w) of a batch, a step follows

        (1 - strength) g + strength grad L(B, w + eps),    eps = rho g / ||g||

    in place of g, with ||.|| the Euclidean norm over all trainable weights; eps is 0 where g is 0
    or not finite. Strength 1 is SAM, which follows grad L(w + eps) alone; a strength below 1 is
    the gradient-norm penalty of Zhao et al., above 1 WSAM in its coupled form.

    L is the compiled loss, with `add_loss` terms. Weight penalties are not a part of the ascent:
    their gradient at w is added to what is followed. Loss, metrics, batch-norm statistics and seeds
    are of the evaluation at w, and both evaluations see the same dropout masks. The precision is
    that of the dtype policy. A step takes 2 passes.

    The value in the logs, `sharpness_aware`, is the sharpness L(B, w + eps) - L(B, w).

    Args:
        rho: Float, greater than 0. The radius ||eps||, in units of the weights (in the adaptive
            norm, if `adaptive`). It is live: `model.regularizer.rho = 0.1` takes effect with the
            next batch. Usual are 0.01 to 0.5, with `adaptive` 0.5 to 2. Defaults to 0.05, as in
            Foret et al.
        strength: Float, 0 or greater. The share of the gradient at w + eps, see above; live.
            0 is training without the rule. Defaults to 1.
        adaptive: Boolean. `True` is ASAM: eps = rho T^2 g / ||T g||, T = |w| + eta for each number
            of all weights but biases (variables named `bias` or `beta`, or ending in `_bias`),
            where T = 1. The scale of batch normalisation (`gamma`) is scaled, as in the authors'
            code. ASAM does not change if two layers are rescaled against each other.
            Defaults to `False`.
        eta: Float, 0 or greater. See `adaptive`, without which it has no effect. Defaults to 0.01.
        num_sub_batches: Integer m, at least 1. With m > 1 (m-SAM) the batch is cut into m slices,
            each with an eps of its own, and their gradients are averaged; batch normalisation then
            sees slices. With R replicas each takes m/R slices, rounded down, and at least one.
            With m = 1 eps is of the whole batch on any number of replicas, which costs a sum of
            the gradients over them; for an eps of each replica's own, use m = R. Defaults to 1.
        direction: `"gradient"`, the above, or `"noise"`, Friendly-SAM: eps goes along g less its
            running mean, m <- 0.9 m + 0.1 g, instead of g. Defaults to `"gradient"`.

    Attributes:
        rho: The live radius, a `keras.Variable`. Assign a float to change it.

    Raises:
        ValueError: If an argument is out of its range; in `compile`, if `num_sub_batches` is
            greater than 1 and the loss is no mean over the examples; in `fit`, if `adaptive=True`
            and weights are of half precision, if layers are quantised to float8, or if one assigns
            its own trainable weights when it is called (`SpectralNormalization`).

    Example:

    ```python
    model.compile("sgd", "mse", regularizer=SharpnessAware(rho=0.1))
    ```

    Reference: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", ICLR 2021, Algorithm 1 and Section 4.1 for m-SAM
    (https://arxiv.org/abs/2010.01412). Kwon, Kim, Park and Choi, "ASAM", ICML 2021
    (https://arxiv.org/abs/2102.11600). Zhao, Zhang and Hu, "Penalizing Gradient Norm for
    Efficiently Improving Generalization in Deep Learning", ICML 2022
    (https://arxiv.org/abs/2202.03599). Yue et al., "Sharpness-Aware Minimization Revisited:
    Weighted Sharpness as a Regularization Term", KDD 2023 (https://arxiv.org/abs/2305.15817).
    Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024
    (https://arxiv.org/abs/2403.12350).
    """

    float32 = False
    rho = Live(validation.positive)

    def __init__(
        self,
        rho: float = 0.05,
        strength: float = 1.0,
        adaptive: bool = False,
        eta: float = 0.01,
        num_sub_batches: int = 1,
        direction: str = "gradient",
    ):
        super().__init__(strength)
        self.rho = rho
        validation.boolean(adaptive=adaptive)
        validation.non_negative(eta=eta)
        validation.integer(minimum=1, num_sub_batches=num_sub_batches)
        validation.one_of("gradient", "noise", direction=direction)
        self.adaptive = bool(adaptive)
        self.eta = eta
        self.num_sub_batches = num_sub_batches
        self.direction = direction

    def check(self, model: keras.Model):
        """Refuse a loss that is no mean over the examples, and warn of another number of slices."""
        if self.num_sub_batches > 1:
            self._refuse_if_uncuttable(model)
            warn_of_uneven_shares(model, stacklevel=3, num_sub_batches=self.num_sub_batches)

    def build(self, variables: Sequence[keras.Variable]):
        """Refuse weights that do not fit, and begin the running mean of Friendly-SAM at zero."""
        halves = half_precision(variables)
        if self.adaptive and halves:
            raise ValueError(
                "Weights must be float32 or float64 where `adaptive=True`: squares of weights and "
                f"gradients vanish in half precision. Received: half-precision weights {halves}. "
                'Use the dtype policy "mixed_float16" or "mixed_bfloat16".'
            )
        refuse_float8(variables)
        if self.direction == "noise":
            self.memory = [
                keras.Variable(ops.zeros(v.shape), dtype=v.dtype, trainable=False, name=f"mean_{k}")
                for k, v in enumerate(variables)
            ]

    def replaces_main_pass(self, model: keras.Model) -> bool:
        """Return whether the evaluation at w stands for Keras's pass over the batch."""
        if self.num_sub_batches > 1:
            self._refuse_if_uncuttable(model)
        # Else the evaluations, which leave no trace, would keep the buffers from moving.
        return not coupling.has_state_of_its_own(model)

    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return the sharpness, the gradients at w + eps and the evaluation at w."""
        result = self._averaged(objective, batch, memory)
        memory = _moved(memory, result.main.gradients)
        if self.replaces_main_pass(objective.model):
            received = f"a {type(self).__name__}"
            refuse_rewritten(objective, received, "Compile with `regularizer=None`.")
            return Step(result.value, instead=result.gradient, main=result.main, memory=memory)
        pairs = zip(result.gradient, result.main.gradients)
        change = [None if h is None else h - g for h, g in pairs]
        return Step(result.value, gradient=change, memory=memory)

    def _averaged(self, objective: Objective, batch: Batch, memory: list) -> Contribution:
        """Return the mean over the slices, whose `gradient` is that at w + eps."""
        model, state = objective.model, objective.state()
        weights = objective.weights()
        whole = self.num_sub_batches == 1
        scales = [_is_scaled(v) and self.adaptive for v in model.trainable_variables]

        def uphill(gradients):
            if whole:
                gradients = objective.mean_over_replicas(gradients)
            return self._uphill(weights, gradients, scales, memory)

        evaluate = backend.traced_once(objective.evaluate)

        def contribution(i, state, batch):
            here, there = paired_evaluations(evaluate, weights, uphill, state, batch)
            return Contribution(there.loss - here.loss, there.gradients, here)

        if whole:
            return contribution(0, state, batch)
        result = average(
            contribution,
            state,
            objective.sub_batches(batch, share_of_replica(self.num_sub_batches, model)),
            passed_on=objective.seeds(state),
            multiply=times,
            add_up=backend.rolled_into_loop(accumulate, bool(model.jit_compile)),
        )
        predictions = joined(result.main.predictions, backend.batch_size(batch))
        main = result.main._replace(predictions=predictions)
        return Contribution(result.value, result.gradient, main)

    def _uphill(self, weights: list, gradients: list, scales: list[bool], memory: list) -> list:
        """Return w + eps, or w if the norm of the direction is 0 or not finite."""
        means = memory or [None] * len(weights)
        directions = [d if m is None or d is None else d - m for d, m in zip(gradients, means)]
        # T of ASAM; `None` stands for 1.
        factors = [ops.abs(w) + self.eta if s else None for w, s in zip(weights, scales)]
        scaled = [_product(t, d) for t, d in zip(factors, directions)]
        length = norm(scaled)
        moves = ops.logical_and(length > 0, ops.isfinite(length))

        def moved():
            step = ops.cast(self.rho, length.dtype) / length
            triples = zip(weights, factors, scaled)
            return [w if d is None else w + times(step, _product(t, d)) for w, t, d in triples]

        return backend.cond(moves, moved, lambda: list(weights))

    def _refuse_if_uncuttable(self, model):
        received = f"num_sub_batches={self.num_sub_batches}"
        refuse_if_uncuttable(model, received, "Use `num_sub_batches=1`.")

    def get_config(self) -> dict:
        """Return the constructor's arguments, `rho` and `strength` at their present values."""
        return {
            "rho": to_shortest_float(self.rho),
            "strength": to_shortest_float(self.strength),
            "adaptive": self.adaptive,
            "eta": self.eta,
            "num_sub_batches": self.num_sub_batches,
            "direction": self.direction,
        }


def _is_scaled(variable: keras.Variable) -> bool:
    """Return whether ASAM scales the variable, as it does all but biases."""
    return variable.name not in ("bias", "beta") and not variable.name.endswith("_bias")


def _product(factor: Any, array: Any) -> Any:
    """Return factor * array, a factor of `None` being 1 and an array of `None` 0."""
    return array if factor is None or array is None else factor * array


def _moved(means: list, gradients: list) -> list:
    """Return the running means of the gradients, which a gradient that overflows leaves alone."""
    if not means:
        return []
    finite = ops.isfinite(norm(gradients))
    return [
        m if g is None else ops.where(finite, _DECAY * m + (1 - _DECAY) * g, m)
        for m, g in zip(means, gradients)
    ]
