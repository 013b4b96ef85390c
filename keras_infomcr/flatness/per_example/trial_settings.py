"""The settings that all measures of trials of examples share."""

import dataclasses
from typing import Any

from keras_infomcr import validation


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """What is measured of the gradients of the examples of a trial: the arguments of `gamma_hat`.

    The one place of their ranges. `gamma_hat` averages 100 trials by default, as the paper does;
    every other measure of trials, and the callback, averages 10, which ten times as fast give
    three times the standard error. Only the arguments that a measure leaves out have a default
    here.

    Attributes:
        num_examples: Integer, at least 1. N', the examples of a trial.
        num_trials: Integer, at least 1, or `"auto"`.
        training: Boolean, as for the model's `call`.
        chunk_size: Integer, at least 1, or `None`, which means `num_examples`.
        normalize_softmax: Boolean, whether to normalise the logits.
        softmax_scale: Float, greater than 0, the scale of the normalisation.
        seed: Integer or `None`, of the draw of examples.
        loss: The loss to measure instead of the compiled one, or `None`.
        relative_tolerance: Float, greater than 0, the standard error at which `"auto"` stops.

    Raises:
        ValueError: If a setting is out of its range.
    """

    num_examples: int
    num_trials: int | str
    training: bool
    chunk_size: int | None
    normalize_softmax: bool
    softmax_scale: float
    seed: int | None
    loss: Any = None
    relative_tolerance: float = 0.01

    def __post_init__(self):
        validation.integer(minimum=1, num_examples=self.num_examples)
        if not self.is_automatic:
            validation.integer(minimum=1, num_trials=self.num_trials)
        validation.boolean(normalize_softmax=self.normalize_softmax, training=self.training)
        validation.positive(
            relative_tolerance=self.relative_tolerance, softmax_scale=self.softmax_scale
        )
        if self.chunk_size is not None:
            validation.integer(minimum=1, chunk_size=self.chunk_size)
        if self.seed is not None:
            validation.integer(minimum=0, seed=self.seed)

    @property
    def is_automatic(self) -> bool:
        """Whether there are as many trials as `relative_tolerance` asks for."""
        # An array, which is refused, would compare with a string entry by entry.
        return isinstance(self.num_trials, str) and self.num_trials == "auto"

    @property
    def examples_together(self) -> int:
        """The number of examples that go through the model together."""
        return self.chunk_size or self.num_examples

    @property
    def compiled_key(self) -> tuple:
        """The settings on which the compiled functions depend; the seed of the draw is none."""
        scale = self.softmax_scale if self.normalize_softmax else None
        return self.num_examples, self.examples_together, self.training, scale
