"""The regulariser of InfoMCR."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import keras

from keras_infomcr import backend, validation
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.core.sub_batch_averages import (
    Contribution,
    accumulate,
    average,
    finite_difference,
    hessian_vector_product,
)
from keras_infomcr.objective import Batch, Objective, joined
from keras_infomcr.regularizers import dense_slices
from keras_infomcr.regularizers import main_gradient as main_gradients
from keras_infomcr.regularizers.perturbed_subset import perturbing_subset, random_ranks
from keras_infomcr.regularizers.regularizer import Regularizer, Step
from keras_infomcr.regularizers.replicas import share_of_replica, warn_of_uneven_shares
from keras_infomcr.regularizers.weights import half_precision, refuse_float8
from keras_infomcr.regularizers.whole_batches import refuse_rewritten
from keras_infomcr.scalars import times, to_shortest_float


@keras.saving.register_keras_serializable("keras_infomcr")
class SubBatchPerturbation(Regularizer):
    """Penalise sub-batch gradients by a finite difference of the loss (InfoMCR).

    A batch B is cut into M contiguous sub-batches B_i of b_i examples. With g_i the gradient of
    the loss L(B_i, w), held constant, the regulariser is

        R_alpha(w) = sum_i (b_i/B) [ L(B_i, w) - L(B_i, w - alpha g_i) ]

    and a training step follows the gradient of L(B, w) + penalties + beta R_alpha(w). To first
    order R_alpha is alpha times the mean of ||g_i||^2, a sample of the trace of the Fisher
    information. L is the compiled loss, with `add_loss` terms and without weight penalties.
    All is computed in float32 at least, whatever the dtype policy.

    Every pair of evaluations starts from the weights and the state (batch-norm statistics, seeds,
    variables that a layer assigns when it is called) that the main pass over the batch has left.
    What the pairs do to that state is dropped, so that it moves once a step.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Section 6 and Algorithm 1 (https://arxiv.org/abs/1911.08192).
    The paper has b_i/B = 1/M, which is the same when M divides B.

    Args:
        alpha: Float, greater than 0. Step of the finite difference, in units of the weights per
            unit of the gradient. Defaults to 1e-4, the paper's.
        beta: Float, 0 or greater. Coefficient of R_alpha; the paper tries 1 to 100. It is live:
            `model.regularizer.beta = 20.0` takes effect with the next batch. Defaults to 10.
        num_sub_batches: Integer, at least 1. M, the number of sub-batches; a batch of fewer
            examples is cut into single examples. With R replicas, each takes M/R sub-batches,
            rounded down, and at least one. In TensorFlow under XLA (`jit_compile=True`), and on JAX
            where M does not divide the batch, the time that the first step takes to compile grows
            with M. Defaults to 8, the paper's.
        main_gradient: Where the gradient of L(B, w) comes from.
            `"full_batch"`: a pass of its own over the whole batch, as in the paper's code
            (3 passes a step). `"sub_batches"`: the mean of the g_i (2 passes); batch
            normalisation then sees sub-batches, its moving variance their mean variance, metrics
            that a layer updates in its `call` stand still, and a loss that weighs an example by
            the rest of the batch (`ignore_class`, masks, `Dice`) is the loss of each sub-batch.
            `"auto"`: the second where the numbers are known to be the same, else the first. They
            are for a Functional or Sequential model of layers of Keras and operations of
            `keras.ops` that neither couple the examples of a batch nor draw random numbers, with
            losses of Keras that are means over the examples and see no mask; and with batch
            normalisation where the one sub-batch of a replica is its share of the batch. (On
            TensorFlow a model with an `Embedding` must also be trained by SGD without clipping:
            to other optimizers a sparse gradient is not what its sum is.) Defaults to `"auto"`.
        num_perturbed: Integer from 1 to `num_sub_batches`, or `None`. Only so many sub-batches,
            drawn at random for each step, are perturbed, and their mean stands for the mean of all:
            R_alpha and its gradient are unbiased and noisier. A step then takes 1 + k/M passes
            instead of 2 (but 2 where all weights are in Dense layers), or 1 + 2 k/M instead
            of 3. The sub-batches are drawn deterministically from `optimizer.iterations`. With R
            replicas, each perturbs k/R. Defaults to `None`: all are perturbed.
        estimator: `"finite_difference"`, the above (Algorithm 1), or `"hessian_vector_product"`,
            its limit to first order in alpha: R = alpha sum_i (b_i/B) ||g_i||^2 and, g_i held
            constant, the gradient alpha sum_i (b_i/B) H_i g_i, with H_i the Hessian of L(B_i, w).
            The first also sees the kinks of the loss (ReLU) that lie between w and w - alpha g,
            the second curvature alone, at a higher cost. Defaults to `"finite_difference"`.

    Attributes:
        beta: The live coefficient, a `keras.Variable`. Assign a float to change it.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    model.compile("sgd", "mse", regularizer=SubBatchPerturbation(beta=20.0))
    ```
    """

    beta = Regularizer.strength

    def __init__(
        self,
        alpha: float = 1e-4,
        beta: float = 10.0,
        num_sub_batches: int = 8,
        main_gradient: str = "auto",
        num_perturbed: int | None = None,
        estimator: str = "finite_difference",
    ):
        validation.positive(alpha=alpha)
        validation.non_negative(beta=beta)
        validation.integer(minimum=1, num_sub_batches=num_sub_batches)
        validation.one_of("auto", "full_batch", "sub_batches", main_gradient=main_gradient)
        validation.one_of("finite_difference", "hessian_vector_product", estimator=estimator)
        if num_perturbed is not None:
            validation.integer(minimum=1, maximum=num_sub_batches, num_perturbed=num_perturbed)
        super().__init__(beta)
        self.alpha = alpha
        self.num_sub_batches = num_sub_batches
        self.main_gradient = main_gradient
        self.num_perturbed = num_perturbed
        self.estimator = estimator
        # Made here, for no variable may be made in what is traced.
        self._seed_generator = num_perturbed and keras.random.SeedGenerator(0)

    @property
    def log_key(self) -> str:
        return "infomcr_reg"

    def replaces_main_pass(self, model: keras.Model) -> bool:
        """Return whether the gradient of the loss is the mean of the sub-batch gradients."""
        count = self.num_sub_batches
        return main_gradients.is_mean_of_sub_batches(self.main_gradient, model, count)

    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return R_alpha and its gradient, with the main pass if the sub-batches give it."""
        model = objective.model
        with_main = self.replaces_main_pass(model)
        state = objective.state()
        sub_batches = objective.sub_batches(batch, share_of_replica(self.num_sub_batches, model))
        count = self._num_chosen(model, len(sub_batches))
        ranks = None
        if count < len(sub_batches):
            ranks = self._random_ranks(len(sub_batches), model.optimizer.iterations)
        in_turn = functools.partial(
            self._in_turn, objective, state, batch, sub_batches, ranks, count, with_main
        )
        # At once, the sub-batches that are not chosen cost as much as the others.
        gains = self.estimator == "finite_difference" and (with_main or ranks is None)
        if gains and dense_slices.dense_layers(model):
            chosen = None if ranks is None else ranks < count
            at_once = functools.partial(
                dense_slices.finite_difference,
                objective, state, batch, self.alpha, len(sub_batches), chosen, with_main,
            )  # fmt: skip
            result = dense_slices.faster_of(
                at_once, in_turn, state, backend.batch_size(batch), len(sub_batches)
            )
        else:
            result = in_turn()
        if ranks is not None:  # the sub-batches chosen stand for all
            result = _scaled(result, len(sub_batches) / count)
        if with_main:
            refuse_rewritten(objective, main_gradients.SUB_BATCHES, main_gradients.FULL_BATCH)
        return Step(result.value, result.gradient, result.main)

    def _in_turn(
        self, objective, state, batch, sub_batches, ranks, count, with_main
    ) -> Contribution:
        """Return the average over the sub-batches, one pair of evaluations after the other."""
        evaluate = backend.traced_once(objective.evaluate)  # once, however many places call it
        contribution = self._contribution(objective, evaluate)
        if ranks is not None:
            of_others = evaluate if with_main else None
            weights = objective.weights()
            contribution = perturbing_subset(contribution, ranks, count, weights, of_others)
        result = average(
            contribution,
            state,
            sub_batches,
            passed_on=objective.seeds(state),
            with_main=with_main,
            multiply=times,
            add_up=backend.rolled_into_loop(accumulate, bool(objective.model.jit_compile)),
        )
        if not with_main:
            return result
        predictions = joined(result.main.predictions, backend.batch_size(batch))
        return dataclasses.replace(result, main=result.main._replace(predictions=predictions))

    def _contribution(
        self, objective: Objective, evaluate: Callable[..., Evaluation]
    ) -> Callable[[int, list, Batch], Contribution]:
        """Return the function of a sub-batch, its number and the state that it starts from."""
        weights = objective.weights()
        if self.estimator == "finite_difference":
            return finite_difference(evaluate, weights, self.alpha, backend.plus_multiple)
        products = backend.traced_once(objective.evaluate_with_product)
        return hessian_vector_product(products, weights, self.alpha)

    def _random_ranks(self, count, step):
        return random_ranks(self._seed_generator, count, step)

    def _num_chosen(self, model: keras.Model, count: int) -> int:
        """Return how many of the sub-batches of this replica are perturbed."""
        if self.num_perturbed is None:
            return count
        return min(count, share_of_replica(self.num_perturbed, model))

    def check(self, model: keras.Model):
        """Warn of a device that drowns the finite difference, and of another number of slices."""
        warn_of_uneven_shares(
            model,
            stacklevel=3,
            num_sub_batches=self.num_sub_batches,
            num_perturbed=self.num_perturbed,
        )
        if backend.low_precision_products():
            warnings.warn(
                "TensorFloat-32 is on: float32 matrix products round like half precision, and "
                "the difference between the gradients at w and w - alpha g drowns. Call "
                "`tf.config.experimental.enable_tensor_float_32_execution(False)`.",
                stacklevel=3,
            )

    def build(self, variables: Sequence[keras.Variable]):
        """Refuse weights of half and quarter precision, where the finite difference vanishes."""
        halves = half_precision(variables)
        if halves:
            raise ValueError(
                "Weights must be float32 or float64: in half precision w - alpha g is w. "
                f"Received: half-precision weights {halves}. Use the dtype policy "
                '"mixed_float16" or "mixed_bfloat16".'
            )
        refuse_float8(variables)

    def get_config(self) -> dict:
        """Return the constructor's arguments, `beta` at its present value."""
        return {
            "alpha": self.alpha,
            "beta": to_shortest_float(self.beta),
            "num_sub_batches": self.num_sub_batches,
            "main_gradient": self.main_gradient,
            "num_perturbed": self.num_perturbed,
            "estimator": self.estimator,
        }


def _scaled(result: Contribution, factor: float) -> Contribution:
    """Return the result with the regulariser multiplied by a factor."""
    gradient = [None if d is None else times(factor, d) for d in result.gradient]
    return dataclasses.replace(result, value=times(factor, result.value), gradient=gradient)
