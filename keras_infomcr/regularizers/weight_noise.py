"""Training at weights with noise (LPF-SGD, random weight perturbation)."""

from collections.abc import Sequence

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_infomcr import validation
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.standard_normals import StandardNormals
from keras_infomcr.regularizers.weights import at_least_float32, norm, refuse_float8
from keras_infomcr.regularizers.whole_batches import refuse_module_buffers, refuse_rewritten
from keras_infomcr.scalars import times, to_shortest_float


@keras.saving.register_keras_serializable("keras_infomcr")
class WeightNoise(Regularizer):
    """Follow the gradient at weights with noise (LPF-SGD, random weight perturbation).

    A step at the weights w follows the gradient of L(w + n) instead of L(w), one pass over the
    batch as in plain Keras. The noise n is drawn anew for each step and is the same for all
    examples of the batch (of each replica's share of it). An entry of a filter v has noise of

        standard deviation  std * growth(step) * ||v||,

    so that on average training descends L smoothed over a neighbourhood that scales with the
    filters. The ratio ||n|| / ||w|| is about `std` times the root of the number of entries in a
    filter: the same `std` is more noise for larger filters. The logs show the ratio, over all
    weights, as `weight_noise`.

    The pass over the batch is the noisy one: loss, metrics and batch-norm statistics of training
    are those at w + n. So is its precision, which is what the dtype policy says. Weight penalties
    are added at w.

    A filter is what the LAST axis of a variable counts: an output of a `Dense` or a `Conv2D`
    kernel, a column of an embedding, all channels of a depthwise kernel with a multiplier of 1. A
    variable of one axis (a bias, gamma or beta of batch normalisation) is one filter, as in the
    published codes; weights that are zero, as biases are initially, have no noise.

    Args:
        std: Float, 0 or greater. Standard deviation of the noise relative to the norm of a filter;
            0 is plain Keras. It is live: `model.regularizer.std = 0.02` takes effect with the next
            batch. Defaults to 0.01, the default of the published code of random weight
            perturbation; the one of LPF-SGD has 0.001.
        per_filter: Boolean, whether each filter has noise by its own norm, or all of a variable by
            the norm of the whole, which is a greater one. Defaults to `True`.
        growth: A `keras.optimizers.schedules.LearningRateSchedule` whose value at the optimizer's
            step multiplies `std`, or `None` for 1. `CosineDecay(1.0, decay_steps=10_000,
            alpha=10.0)` grows as a cosine from 1 to 10, where it stays. Defaults to `None`.
        seed: Integer from 0 to 2^31 - 1, or `None`, of the noise. Defaults to `None`: drawn as
            Keras's layers draw theirs, so that `keras.utils.set_random_seed` determines it.

    Attributes:
        std: The live standard deviation, a `keras.Variable`. Assign a float to change it.

    Raises:
        ValueError: If an argument is out of its range, or, in training, if a layer assigns its own
            trainable weights when it is called (`SpectralNormalization`), holds the buffers of a
            torch module, or is quantised to float8.

    Example:

    ```python
    model.compile("sgd", "mse", regularizer=WeightNoise(std=0.005))
    ```

    Reference: Bisla, Wang and Choromanska, "Low-Pass Filtering SGD for Recovering Flat Optima in
    the Deep Learning Optimization Landscape", AISTATS 2022 (https://arxiv.org/abs/2201.08025).
    """

    std = Regularizer.strength
    float32 = False

    def __init__(
        self,
        std: float = 0.01,
        per_filter: bool = True,
        growth: LearningRateSchedule | None = None,
        seed: int | None = None,
    ):
        validation.non_negative(std=std)
        validation.boolean(per_filter=per_filter)
        if growth is not None and not isinstance(growth, LearningRateSchedule):
            raise ValueError(
                "`growth` must be a `keras.optimizers.schedules.LearningRateSchedule` or `None`. "
                f"Received: growth={growth!r}"
            )
        super().__init__(std)
        self.per_filter = per_filter
        self.growth = growth
        self.seed = seed
        self._normals = StandardNormals(seed)

    def replaces_main_pass(self, model: keras.Model) -> bool:
        """Return `True`: the pass at w + n is the only one."""
        return True

    def build(self, variables: Sequence[keras.Variable]):
        """Make the seed and the count of draws, which a resumed run goes on from."""
        refuse_float8(variables)
        self.memory = self._normals.memory()

    def check(self, model: keras.Model):
        """Refuse torch modules whose statistics the one pass could not move."""
        refuse_module_buffers(model, self)

    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return the evaluation at w + n, with ||n|| / ||w||."""
        weights = objective.weights()
        (seed,) = memory
        draws, next_seed = self._normals.draw(weights, seed, objective.replica_index())
        scale = self._scale(objective.model.optimizer.iterations)
        noise = [times(scale, z) * self._norms(w) for w, z in zip(weights, draws)]
        noisy = [w + ops.cast(n, w.dtype) for w, n in zip(weights, noise)]
        main = objective.evaluate(noisy, objective.state(), batch)
        refuse_rewritten(objective, "a WeightNoise", "Compile with `regularizer=None`.")
        return Step(ops.divide_no_nan(norm(noise), norm(weights)), main=main, memory=[next_seed])

    def _scale(self, step):
        if self.growth is None:
            return ops.copy(self.std)
        return self.std * ops.cast(self.growth(step), self.std.dtype)

    def _norms(self, weight):
        """Return the norms of the filters of a weight, which broadcast against it."""
        weight = ops.cast(weight, at_least_float32(weight))
        filters = self.per_filter and len(weight.shape) > 1
        axes = tuple(range(len(weight.shape) - 1)) if filters else None
        return ops.sqrt(ops.sum(ops.square(weight), axes, keepdims=True))

    def get_config(self) -> dict:
        """Return the constructor's arguments, `std` at its present value."""
        return {
            "std": to_shortest_float(self.std),
            "per_filter": self.per_filter,
            "growth": keras.saving.serialize_keras_object(self.growth),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict) -> "WeightNoise":
        """Make a rule from what `get_config` returned."""
        growth = keras.saving.deserialize_keras_object(config.get("growth"))
        return cls(**config | {"growth": growth})
