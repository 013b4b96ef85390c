"""What `RegularizedModel.compile(regularizer=...)` takes."""

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_infomcr import validation
from keras_infomcr.core.evaluation import Evaluation
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers.live import Live


@dataclasses.dataclass(frozen=True)
class Step:
    """What a regulariser makes of a batch.

    Attributes:
        value: Scalar array, for the logs.
        gradient: List of arrays and `None` like the weights, or `None`. It is multiplied by the
            regulariser's `strength` and added to the training gradient. A weight that the training
            loss does not depend on is left alone.
        main: `Evaluation` that replaces Keras's own pass over the batch, for a regulariser whose
            `replaces_main_pass` returns `True`: its gradients are followed (with the gradients of
            weight penalties, unless `includes_penalties` is set), its loss and predictions are
            reported to the metrics, and its state is kept. Else `None`: Keras makes that pass.
        memory: List of arrays, the new values of the regulariser's `memory`.
        instead: List of arrays and `None` like the weights, or `None`; given with `main` alone.
            What to follow instead of the gradients g of `main`: the step follows
            (1 - strength) g + strength * instead, which is `instead` itself at strength 1.
        logs: Dictionary of scalar arrays, by the names in the regulariser's `further_logs`.
    """

    value: Any
    gradient: list | None = None
    main: Evaluation | None = None
    memory: Sequence = ()
    instead: list | None = None
    logs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Regularizer(abc.ABC):
    """Base class of the regularisers: rules that change the training gradient of a batch.

    A subclass defines

    * `__call__(objective, batch, memory)`, which returns a `Step`; and
    * `get_config()`, which returns the arguments of its constructor.

    It holds hyper-parameters and its `memory`, and no reference to a model. `__call__` is a pure
    function that is traced by the framework: it computes with `keras.ops`, assigns nothing, and
    sees the model by its `objective` alone:

    * `objective.weights()` and `objective.state()`: lists of arrays, the trainable variables, and
      all else that an evaluation reads and changes (batch-norm statistics, seeds);
    * `objective.evaluate(weights, state, batch)`: an `Evaluation` of the compiled loss, without
      weight penalties, and its gradients, at any weights. It leaves the model as it was. Two
      evaluations that start from the same state see the same dropout masks;
    * `objective.sub_batches(batch, count)`: nearly equal slices of the batch, a sequence of pairs
      `(weight, batch)`, the weight being the size of a slice relative to the mean size.

    `batch` has the attributes `x`, `y` and `sample_weight`, structures of arrays. With several
    replicas, each calls the rule on its own share of the batch, and the results are averaged;
    `objective.mean_over_replicas(arrays)` and `objective.replica_index()` are for rules that need
    the whole batch's gradients, or another draw of random numbers on each.

    Further hyper-parameters become live by a line in the class, `rho = Live(validation.positive)`
    (`keras_infomcr.regularizers.live`).

    Override where it is needed:

    * `build(variables)`: make `memory`, such as `[keras.Variable(ops.zeros(v.shape), dtype=v.dtype,
      trainable=False) for v in variables]`; refuse weights that do not fit.
    * `replaces_main_pass(model)`: return `True` if the rule gives `Step.main`.
    * `check(model)`: raise or warn if the model, as compiled, does not fit.
    * `log_key`: the name of `Step.value` in the logs of `fit`.

    Args:
        strength: Float, 0 or greater. The coefficient of `Step.gradient`, or the share of
            `Step.instead`. It is live: assigned at any time, also inside `fit`, it takes effect
            with the next batch and without re-tracing.

    Attributes:
        strength: A `keras.Variable`. Assign a float to change its value.
        memory: List of `keras.Variable`s, not trainable, which the rule keeps from step to step.
            They are saved and resumed with the model, and are no weights of it: a plain
            `keras.Model` loads the weight file. An instance that keeps a memory belongs to one
            model. The memory also moves in a step that a `LossScaleOptimizer` skips. Defaults
            to none.
        num_sub_batches: Integer, into how many sub-batches a batch should be cut; a run whose
            batches are all smaller is warned of. Defaults to 1.
        further_logs: Sequence of strings, names of further values in the logs of `fit`, each the
            mean over the epoch, as the one of `Step.value`. Defaults to none.
        includes_penalties: Boolean, whether the gradients of `Step.main` hold those of the weight
            penalties already (`objective.penalty_gradients(weights)`). Defaults to `False`.
        float32: Boolean, whether the objective is evaluated in float32 at least, whatever the
            dtype policy, as rules need that take small differences. Defaults to `True`.

    Example:

    Sharpness-aware minimisation (Foret et al., 2021) follows the gradient at a point uphill. Its
    difference from the gradient at w is what the rule adds.

    ```python
    import keras
    from keras import ops
    from keras_infomcr.regularizers import Regularizer, Step

    @keras.saving.register_keras_serializable("my_package")
    class Uphill(Regularizer):
        def __init__(self, rho=0.05, strength=1.0):
            super().__init__(strength)
            self.rho = rho

        def __call__(self, objective, batch, memory):
            weights, state = objective.weights(), objective.state()
            here = objective.evaluate(weights, state, batch)
            squares = [ops.sum(g**2) for g in here.gradients if g is not None]
            step = self.rho / ops.sqrt(sum(squares) + 1e-12)
            pairs = zip(weights, here.gradients)
            uphill = [w if g is None else w + step * g for w, g in pairs]
            there = objective.evaluate(uphill, state, batch)
            pairs = zip(here.gradients, there.gradients)
            change = [None if g is None else h - g for g, h in pairs]
            return Step(value=there.loss - here.loss, gradient=change)

        def get_config(self):
            return {"rho": self.rho, "strength": float(self.strength)}

    model.compile("sgd", "mse", regularizer=Uphill(rho=0.1))
    ```
    """

    num_sub_batches: int = 1
    float32: bool = True
    includes_penalties: bool = False
    further_logs: Sequence[str] = ()
    memory: Sequence[keras.Variable] = ()

    strength = Live(validation.non_negative)

    def __init__(self, strength: float):
        self.strength = strength

    @property
    def live_variables(self) -> list[keras.Variable]:
        """The variables of all live hyper-parameters, which a compiled step reads."""
        return list(self.__dict__["_live"].values())

    @property
    def log_key(self) -> str:
        """The name of the rule's value in the logs of `fit`: the class's name in snake case."""
        return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def build(self, variables: Sequence[keras.Variable]):  # noqa: B027 (most rules keep nothing)
        """Make `memory` for the trainable variables, or raise if these do not fit the rule.

        Called before the first step after each `compile`, and again if the model's trainable
        variables have changed. A memory that a file holds is assigned afterwards.
        """

    def replaces_main_pass(self, model: keras.Model) -> bool:
        """Return whether the rule gives `Step.main`, which must be known before it is traced."""
        return False

    @abc.abstractmethod
    def __call__(self, objective: Objective, batch: Batch, memory: list) -> Step:
        """Return the `Step` of a batch; `memory` holds the values of `self.memory`."""

    def check(self, model: keras.Model):  # noqa: B027 (most rules have nothing to check)
        """Raise or warn if the model, as compiled, does not fit the rule."""

    @abc.abstractmethod
    def get_config(self) -> dict:
        """Return the constructor's arguments as a dictionary."""

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    @classmethod
    def from_config(cls, config: dict) -> "Regularizer":
        """Make a regulariser from what `get_config` returned."""
        return cls(**config)
