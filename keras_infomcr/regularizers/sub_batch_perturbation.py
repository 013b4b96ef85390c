"""The regulariser of InfoMCR."""

import dataclasses
import warnings

import keras

from keras_infomcr import backend, validation
from keras_infomcr.core.sub_batch_averages import (
    accumulate,
    finite_differences,
    hessian_vector_products,
)
from keras_infomcr.objective import HALF_PRECISION, float8_scales, is_mean_over_examples
from keras_infomcr.regularizers import coupling
from keras_infomcr.regularizers.regularizer import Regularizer
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
        num_sub_batches: Integer, at least 1. M, the number of sub-batches; a batch smaller than
            that is cut into single examples. Of R replicas each takes M/R, rounded down, and at
            least one. Under XLA (`jit_compile=True`, and on JAX) the time that the first step
            takes to compile grows with M. Defaults to 8, the paper's.
        main_gradient: Where the gradient of L(B, w) comes from.
            `"full_batch"`: a pass of its own over the whole batch, as in the paper's code
            (3 passes a step). `"sub_batches"`: the mean of the g_i (2 passes); batch
            normalisation then sees sub-batches, its moving variance their mean variance, metrics
            that a layer updates in its `call` stand still, and a loss that weighs an example by
            the rest of the batch (`ignore_class`, masks, `Dice`) is that of each sub-batch.
            `"auto"`: the second where the numbers are known to be the same (a Functional model of
            layers of Keras that neither couple the examples of a batch nor draw random numbers,
            with losses of Keras that are means over the examples), else the first. Defaults to
            `"auto"`.
        num_perturbed: Integer from 1 to `num_sub_batches`, or `None`. Only so many sub-batches,
            drawn at random for each step, are perturbed, and their mean stands for that of all:
            R_alpha and its gradient are unbiased and noisier. A step then takes 1 + k/M passes
            instead of 2, or 1 + 2 k/M instead of 3. The draw follows from the optimizer's step
            count. Of R replicas each perturbs k/R, as with M. Defaults to `None`: all.
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
        self._seed_generator = num_perturbed and keras.random.SeedGenerator(0)

    def __call__(self, objective, batch):
        """Return the `SubBatchAverages` of a batch, with the main pass if they are to give it."""
        model = objective.model
        self.check_weights(model)  # built, perhaps, only now
        count = _share(self.num_sub_batches, _num_replicas(model))
        sub_batches = objective.sub_batches(batch, count)
        weights, state = objective.weights(), objective.state()
        main_pass = self.gives_main_gradient(model)
        gradients = backend.traced_once(_gradients_of(objective))
        average, evaluate = finite_differences, gradients
        if self.estimator == "hessian_vector_product":
            average = hessian_vector_products
            evaluate = backend.traced_once(_products_of(objective))
        chosen = self._num_chosen(model, len(sub_batches))
        choose = None
        if chosen < len(sub_batches):
            ranks = self._random_ranks(len(sub_batches), model.optimizer.iterations)
            rest = gradients if main_pass else None
            choose = _chooser(ranks, chosen, weights, rest)
        result = average(
            evaluate,
            weights,
            state,
            sub_batches,
            self.alpha,
            passed_on=objective.seeds(state),
            main_pass=main_pass,
            multiply=times,
            add_up=backend.looped(accumulate, bool(model.jit_compile)),
            choose=choose,
        )
        if main_pass and objective.rewritten:
            raise ValueError(
                "Layers that assign their own trainable weights when they are called must see "
                'whole batches. Received: main_gradient="sub_batches" and layers that assign '
                f'{sorted(objective.rewritten)}. Use `main_gradient="full_batch"`.'
            )
        return result if choose is None else _scaled(result, len(sub_batches) / chosen)

    def _num_chosen(self, model, count):
        """Return how many of the sub-batches of this replica are perturbed."""
        if self.num_perturbed is None:
            return count
        return min(count, _share(self.num_perturbed, _num_replicas(model)))

    def _random_ranks(self, count, step):
        """Return the numbers below `count` in an order that the step's number determines."""
        state = self._seed_generator.state
        seed = keras.ops.stack([keras.ops.cast(n, state.dtype) for n in (0, step)])
        with keras.StatelessScope([(state, seed)]):
            return keras.random.shuffle(keras.ops.arange(count), seed=self._seed_generator)

    def gives_main_gradient(self, model):
        """Return whether the gradient of the loss is the mean of the sub-batch gradients."""
        if self.main_gradient == "auto":
            return coupling.couples_no_examples(model)
        if self.main_gradient == "sub_batches" and not is_mean_over_examples(model):
            raise ValueError(
                "The loss must be a mean over the examples where the training gradient is the "
                'mean over sub-batches. Received: main_gradient="sub_batches" and '
                f'loss={model.loss!r}. Use `main_gradient="full_batch"`.'
            )
        if self.main_gradient == "sub_batches" and coupling.has_state_by_example(model):
            raise ValueError(
                "Stateful recurrent layers must see whole batches. Received: "
                'main_gradient="sub_batches". Use `main_gradient="full_batch"`.'
            )
        if self.main_gradient == "sub_batches" and coupling.has_state_of_its_own(model):
            raise ValueError(
                "Torch modules with buffers, such as batch normalisation, must see whole batches. "
                'Received: main_gradient="sub_batches". Use `main_gradient="full_batch"`.'
            )
        return self.main_gradient == "sub_batches"

    def check(self, model):
        """Warn of a device that drowns the finite difference, and of another number of slices."""
        replicas = _num_replicas(model)
        for name in ("num_sub_batches", "num_perturbed"):
            asked = getattr(self, name)
            if asked is not None and asked % replicas:
                count = _share(asked, replicas)
                warnings.warn(
                    f"`{name}` must be a multiple of the number of replicas to be kept to, for "
                    "each takes as many sub-batches as the others, and at least one. Received: "
                    f"{name}={asked} with {replicas} replicas. Each takes {count}, which makes "
                    f"{count * replicas} in all.",
                    stacklevel=3,
                )
        if backend.low_precision_products():
            warnings.warn(
                "TensorFloat-32 is on: float32 matrix products round like half precision, and "
                "the difference between the gradients at w and w - alpha g drowns. Call "
                "`tf.config.experimental.enable_tensor_float_32_execution(False)`.",
                stacklevel=3,
            )

    def check_weights(self, model):
        """Refuse weights of half and quarter precision, where the finite difference vanishes."""
        halves = [v.path for v in model.trainable_variables if v.dtype in HALF_PRECISION]
        if halves:
            raise ValueError(
                "Weights must be float32 or float64: in half precision w - alpha g is w. "
                f"Received: half-precision weights {halves}. Use the dtype policy "
                '"mixed_float16" or "mixed_bfloat16".'
            )
        scales = float8_scales(model)
        if scales:
            raise ValueError(
                "Layers must not be quantised to float8, where the loss at w - alpha g is that at "
                f"w. Received: float8 scales {scales}. Train with float32, mixed_float16 or "
                "mixed_bfloat16, or with `compile(regularizer=None)`."
            )

    def get_config(self):
        """Return the constructor's arguments, `beta` at its present value."""
        return {
            "alpha": self.alpha,
            "beta": to_shortest_float(self.beta),
            "num_sub_batches": self.num_sub_batches,
            "main_gradient": self.main_gradient,
            "num_perturbed": self.num_perturbed,
            "estimator": self.estimator,
        }


def _num_replicas(model):
    """Return how many replicas cut their own shares of a batch."""
    if coupling.has_state_by_example(model):
        return backend.num_parallel_steps(model)  # on JAX its one step cuts the whole batch
    return backend.num_replicas(model)


def _share(count, replicas):
    """Return how many of `count` sub-batches fall to one replica."""
    return max(1, count // replicas)


def _chooser(ranks, count, weights, gradients):
    """Return the function that perturbs the sub-batches of the `count` lowest ranks.

    Of the others it evaluates the `gradients` alone, or nothing if these are `None`.
    """
    zeros = [keras.ops.zeros_like(w) for w in weights]
    zero = keras.ops.zeros((), backend.widest_float())

    def completed(new_state, state):
        return [old if new is None else new for new, old in zip(new_state, state)]

    def choose(i, terms, state, batch):
        def perturbed():
            value, gradient, *rest = terms(state, batch)
            value = keras.ops.cast(value, zero.dtype)
            gradient = [z if d is None else d for z, d in zip(zeros, gradient)]
            return value, gradient, rest if gradients else completed(rest[-1], state)

        def unperturbed():
            if not gradients:
                return zero, zeros, state
            return zero, zeros, list(gradients(weights, state, batch))

        value, gradient, rest = backend.cond(ranks[i] < count, perturbed, unperturbed)
        if not gradients:
            rest = zero, [None] * len(weights), None, rest
        return value, gradient, *rest

    return choose


def _scaled(result, factor):
    """Return `SubBatchAverages` with the regulariser multiplied by a factor."""
    gradient = [None if d is None else times(factor, d) for d in result.gradient]
    return dataclasses.replace(result, value=times(factor, result.value), gradient=gradient)


def _gradients_of(objective):
    value_and_grad = backend.value_and_grad(objective)

    def evaluate(weights, state, sub_batch):
        (loss, (predictions, new_state)), gradients = value_and_grad(weights, state, sub_batch)
        objective.note_gradients(gradients)
        return loss, gradients, predictions, new_state

    return evaluate


def _products_of(objective):
    product_with_gradient = backend.hessian_vector_product(objective)

    def evaluate(weights, state, sub_batch):
        value, gradients, products = product_with_gradient(weights, None, state, sub_batch)
        loss, (predictions, new_state) = value
        objective.note_gradients(gradients)
        squares = [keras.ops.sum(keras.ops.square(g)) for g in gradients if g is not None]
        squared_norm = keras.ops.cast(sum(squares), loss.dtype)
        return loss, gradients, products, squared_norm, predictions, new_state

    return evaluate
