"""Entropy-SGD: steps along the gradient of the local entropy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_infomcr import backend, validation
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.langevin_step import langevin_step
from keras_infomcr.core.sub_batch_averages import accumulate
from keras_infomcr.objective import Batch, Objective, joined, scales_loss
from keras_infomcr.regularizers.mini_batches import MiniBatches
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.standard_normals import StandardNormals
from keras_infomcr.regularizers.weights import at_least_float32, norm, refuse_float8
from keras_infomcr.regularizers.whole_batches import refuse_module_buffers, refuse_rewritten
from keras_infomcr.scalars import times, to_shortest_float


@keras.saving.register_keras_serializable("keras_infomcr")
class EntropySGD(Regularizer):
    """Follow the gradient of the local entropy, taken by Langevin dynamics (Entropy-SGD).

    A batch is cut into L = `num_steps` contiguous mini-batches B_l. From x' = mu = w, each takes
    one step of a chain about the weights w:

        x' <- x' - step_size [ grad f(B_l, x') - gamma (w - x') ] + sqrt(step_size) noise N
        mu <- averaging mu + (1 - averaging) x'

    N is standard normal, and f the compiled loss with weight penalties. What the optimizer gets as
    the gradient at w is w - mu. So its learning rate is a share of the way to mu: `SGD(1.0)` goes
    there, and rates that train a network by its gradient are far too small. Where the chain is in
    equilibrium, gamma (w - mu) is the gradient of -log of the integral of
    exp(-f(x') - gamma/2 ||x' - w||^2), which is low where a minimum is wide.

    One training step is one outer step of the paper, at the cost of one pass over the batch. With
    mini-batches of b examples give `fit` a `batch_size` of L b; a smaller batch, such as the last
    one of an epoch, is cut into smaller mini-batches, or into single examples. Schedules count
    outer steps, as the paper's do. Between steps the model stands at w: `evaluate`, callbacks and
    files see the centre. Batch-norm statistics and seeds go from each inner pass to the next, and
    loss and metrics are those of the inner passes (with weight penalties at w). The paper
    re-estimates batch-norm statistics at w before each test: `flatness.reestimate_batch_norm`.

    With R replicas, mini-batch l is the union of their slices l, and all follow one chain with the
    same noise, whose gradient is averaged over the replicas in each inner step. While the gate is
    closed (`regularizer_active = False`), steps are Keras's own, at the same learning rate.

    The value in the logs, `entropy_sgd`, is ||w - mu||.

    Where the paper and the authors' codes differ, or leave a choice:

    * The inner steps have Nesterov's momentum, zero when an outer step begins. The gradient of f,
      with weight penalties, enters it, the force gamma (w - x') and the noise do not. Without
      these two a chain is `SGD(step_size, momentum, nesterov=True)` of Keras.
    * The noise is the paper's. Both codes move by a further factor of sqrt(2).
    * The paper's outer step is along gamma (w - mu), both codes' along w - mu: `scale_by_gamma`.

    Args:
        num_steps: Integer L, at least 1. Inner steps, and mini-batches of a batch. Defaults to 20.
        step_size: Float, greater than 0. Learning rate of the inner steps. Defaults to 0.1.
        gamma: Float, 0 or greater. Strength of the force towards w, at the first step. It is live:
            `model.regularizer.gamma = 0.1` takes effect with the next batch. Defaults to 0.03.
        gamma_growth: Float, 0 or greater ("scoping"). The force is gamma (1 + gamma_growth)^t, t
            the number of the optimizer's steps. It grows without a limit, and the chain diverges
            where step_size gamma (1 + gamma_growth)^t exceeds 2: after 6,500 steps by default.
            Defaults to 1e-3.
        noise: Float, 0 or greater. See above. Defaults to 1e-4.
        momentum: Float from 0, less than 1, of the inner steps. Defaults to 0.9.
        averaging: Float from 0, less than 1. The weight of the earlier mean in mu, see above.
            Defaults to 0.75, the authors' codes'.
        scale_by_gamma: Boolean. `True` gives the optimizer gamma (w - mu), gamma as grown, instead
            of w - mu. Defaults to `False`.
        seed: Integer from 0 to 2^31 - 1, or `None`, of the noise. Defaults to `None`: drawn as
            Keras's layers draw theirs, so that `keras.utils.set_random_seed` determines it.

    Attributes:
        gamma: The live strength of the force, a `keras.Variable`. Assign a float to change it.

    Raises:
        ValueError: If an argument is out of its range; in `compile` or `fit`, if a layer assigns
            its own trainable weights when it is called (`SpectralNormalization`), holds the buffers
            of a torch module, or is quantised to float8.

    Example:

    ```python
    model.compile(keras.optimizers.SGD(1.0), "mse", regularizer=EntropySGD(num_steps=20))
    model.fit(x, y, batch_size=20 * 128)
    ```

    Reference: Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", ICLR
    2017, Algorithm 1 (https://arxiv.org/abs/1611.01838). Defaults are its settings for CIFAR-10.
    """

    gamma = Regularizer.strength
    float32 = False
    includes_penalties = True

    def __init__(
        self,
        num_steps: int = 20,
        step_size: float = 0.1,
        gamma: float = 0.03,
        gamma_growth: float = 1e-3,
        noise: float = 1e-4,
        momentum: float = 0.9,
        averaging: float = 0.75,
        scale_by_gamma: bool = False,
        seed: int | None = None,
    ):
        validation.integer(minimum=1, num_steps=num_steps)
        validation.positive(step_size=step_size)
        validation.non_negative(gamma=gamma)
        validation.non_negative(gamma_growth=gamma_growth, noise=noise)
        validation.below_one(momentum=momentum, averaging=averaging)
        validation.boolean(scale_by_gamma=scale_by_gamma)
        super().__init__(gamma)
        self.num_sub_batches = num_steps
        self.step_size = step_size
        self.gamma_growth = gamma_growth
        self.noise = noise
        self.momentum = momentum
        self.averaging = averaging
        self.scale_by_gamma = bool(scale_by_gamma)
        self.seed = seed
        self._normals = StandardNormals(seed)

    @property
    def num_steps(self) -> int:
        return self.num_sub_batches

    def replaces_main_pass(self, model: keras.Model) -> bool:
        """Return `True`: no gradient is taken of the whole batch."""
        return True

    def build(self, variables: Sequence[keras.Variable]):
        """Make the seed and the count of draws, which a resumed run goes on from."""
        refuse_float8(variables)
        self.memory = self._normals.memory()

    def check(self, model: keras.Model):
        """Refuse torch modules whose statistics the inner passes could not move."""
        refuse_module_buffers(model, self)

    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return ||w - mu|| with the evaluation whose gradients are w - mu."""
        weights = objective.weights()
        gamma = self._gamma(objective.model.optimizer.iterations)
        mini_batches = MiniBatches(objective, batch, self.num_steps)
        step = self._inner_step(objective, weights, gamma, mini_batches)
        still = [ops.zeros(ops.shape(w), at_least_float32(w)) for w in weights]
        chain = [*objective.state(), *memory], still, still
        add_up = backend.rolled_into_loop(accumulate, bool(objective.model.jit_compile))
        (loss, overflow, *means), outputs = add_up(step, chain, len(mini_batches))
        refuse_rewritten(objective, "an EntropySGD", "Compile with `regularizer=None`.")
        predictions, states = zip(*outputs)
        *state, seed = states[-1]
        # Not a number where gradients have overflowed, so that the optimizer skips the step.
        factor = ops.subtract(overflow, gamma if self.scale_by_gamma else 1.0)
        pairs = zip(means, weights)
        main = Evaluation(
            times(1 / len(mini_batches), loss),
            [None if m is None else ops.cast(times(factor, m), w.dtype) for m, w in pairs],
            joined(predictions, backend.batch_size(batch)),
            state,
        )
        return Step(norm(means), main=main, memory=memory if seed is None else [seed])

    def _inner_step(
        self, objective: Objective, weights: list, gamma: Any, mini_batches: MiniBatches
    ) -> Callable:
        """Return a step of the chain, for `accumulate`.

        The chain is the state with the seed of the noise, the displacements u = x' - w, which keep
        their digits beside w, and the velocities. The summands are the terms of the mean loss; 0,
        or NaN if the gradients overflow; and the terms of mu - w, the mean of the displacements.
        The output is the predictions and what has changed of the state.
        """
        evaluate = backend.traced_once(objective.evaluate)
        shares = mini_batches.shares_in_running_mean(self.averaging)
        may_overflow = scales_loss(objective.model.optimizer)

        def step(i, chain):
            before, displacements, velocities = chain
            weight, mini_batch = mini_batches[i]
            there = [w + ops.cast(u, w.dtype) for w, u in zip(weights, displacements)]
            found = evaluate(there, before[:-1], mini_batch)
            gradients = mini_batches.whole_gradients(i, found.gradients, there)
            gradients, overflow = _held_on_overflow(gradients, may_overflow)
            draws, seed = self._draws(weights, before[-1])
            displacements, velocities = langevin_step(
                displacements,
                velocities,
                gradients,
                draws,
                step_size=self.step_size,
                gamma=gamma,
                noise=self.noise,
                momentum=self.momentum,
                multiply=times,
            )
            after = mini_batches.chosen(i, [*found.state, seed], before)
            share = ops.take(shares, i)
            moved = zip(displacements, gradients)
            means = [None if g is None else times(share, u) for u, g in moved]
            changed = [None if a is b else a for a, b in zip(after, before)]
            summands = [times(weight, found.loss), overflow, *means]
            return summands, (found.predictions, changed), (after, displacements, velocities)

        return step

    def _draws(self, weights: list, seed: Any) -> tuple[list, Any]:
        """Return standard normal draws, or `None` where there is no noise, and the next seed."""
        if not self.noise:
            return [None] * len(weights), None
        return self._normals.draw(weights, seed)

    def _gamma(self, step: Any) -> Any:
        """Return gamma (1 + gamma_growth)^step."""
        gamma = ops.copy(self.gamma)
        # The exponent is small, so that rounding it to float32 changes the last digits alone.
        return gamma * ops.exp(ops.cast(step, gamma.dtype) * math.log1p(self.gamma_growth))

    def get_config(self) -> dict:
        """Return the constructor's arguments, `gamma` at its present value."""
        return {
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "gamma": to_shortest_float(self.gamma),
            "gamma_growth": self.gamma_growth,
            "noise": self.noise,
            "momentum": self.momentum,
            "averaging": self.averaging,
            "scale_by_gamma": self.scale_by_gamma,
            "seed": self.seed,
        }


def _held_on_overflow(gradients: list, may_overflow: bool) -> tuple[list, Any]:
    """Return the gradients, or zeros if one is not finite, with 0 or NaN.

    So the batch-norm statistics of further passes are finite in a step that is skipped.
    """
    if not may_overflow:
        return gradients, ops.zeros(())
    finite = ops.isfinite(norm(gradients))
    held = [None if g is None else ops.where(finite, g, 0.0) for g in gradients]
    return held, ops.where(finite, 0.0, math.nan)
