"""Measures of flatness in the logs of `fit`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_infomcr import flatness
from keras_infomcr.callbacks.measuring_callback import MeasuringCallback, check_one_tuple
from keras_infomcr.flatness.data.examples import Batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.running.checks import MisfitWarning
from keras_infomcr.flatness.running.only_checking import only_checking

_NUMBER = "A measure must give a result with a single number as its `value`, to be logged."


class FlatnessCallback(MeasuringCallback):
    """Log measures of flatness at the end of epochs.

    For each measure, its name and the name with `_stderr` are added to the logs of each epoch,
    NaN for an epoch without a measurement. Put the callback before the callbacks that read the
    logs (`CSVLogger`, `TensorBoard`): a warning names readers that stand before it. It works with
    any `keras.Model`, and leaves the model, its optimizer and all seeds as they are. What a
    measure compiles is kept as long as the model lives.

    Args:
        data: Tuple `(x, y)` of arrays or structures of arrays, or a `tf.data.Dataset`, torch
            `DataLoader` or another iterable of batches `(x, y)`: training data without
            augmentation. Models of KerasHub preprocess them as they preprocess the data of `fit`.
        measures: List of names of functions of `keras_infomcr.flatness`, such as
            `"hessian_trace"`, called at their defaults with `seed=0`, so that epochs, runs and
            processes compare; or functions `f(model, x, y)` that return a result with `value`
            and `stderr`: `functools.partial(hessian_trace, num_examples=100, seed=0)`. A function
            is logged by its `__name__`. Measures without a seed draw anew in each epoch. A model
            whose `train_step` or `compute_loss` is its own is measured by
            `functools.partial(hessian_trace, loss=..., seed=0)`.
        frequency: Integer, at least 1. Measure every so many epochs, and after the last. Defaults
            to 1.
        verbose: 0 or 1. With 1, a line is printed for each measurement, and once, after the
            second, what part of an epoch's time it takes. Defaults to 0.

    Attributes:
        results: Dictionary of the last results by name, empty before the first.

    Raises:
        TypeError: When training begins, if the data are of a wrong type.
        ValueError: If an argument is out of its range, or two measures have the same name; when
            training begins, if the data are empty, hold NaN or infinity (of batches, in the
            first), or can be read once only, and what the measures of
            `keras_infomcr.flatness` refuse (of a model that is built later, as soon as it is);
            at the first measurement, what another function raises.

    Example:

    ```python
    on_subsets = functools.partial(hessian_spectral_radius, num_examples=100, seed=0)
    callback = FlatnessCallback((x, y), measures=["fisher_trace", on_subsets], frequency=5)
    model.fit(x, y, epochs=10, callbacks=[callback])
    ```
    """

    def __init__(
        self,
        data: Any,
        measures: Sequence[str | Callable[..., Any]],
        frequency: int = 1,
        verbose: int = 0,
    ):
        check_one_tuple(data, measures)
        super().__init__(data, frequency, verbose)
        if not isinstance(measures, (list, tuple)) or not measures:
            raise ValueError(
                "`measures` must be a list of names or functions, not empty. "
                f"Received: measures={measures!r}"
            )
        named = [_named(measure) for measure in measures]
        self._measures = dict(named)
        if len(self._measures) < len(named):
            raise ValueError(
                "`measures` must have different names, by which they are logged. "
                f"Received: {[name for name, _ in named]}. Define a function for one of them."
            )
        self.names = [n for name in self._measures for n in (name, f"{name}_stderr")]
        self.results = {}

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        next(iter(Batches(*self.examples(), chunk_size=1)))  # checks the data
        # A model that has diverged is warned of by each measure once, not in each epoch.
        self._misfit_warnings = {name: MisfitWarning() for name in self._measures}
        self._checked = False
        self._check()

    def on_train_batch_begin(self, batch, logs=None):
        self._check()

    def _check(self):
        """Let our measures check what they are given, as soon as the model has weights."""
        # In this order: on JAX Keras reattaches the state of `fit` wherever `self.model` is used.
        if self._checked or not self.model.built:
            return
        self._checked = True
        for name, function in self._measures.items():
            # A function of the user's may compute for hours.
            if str(_underlying(function).__module__).startswith("keras_infomcr."):
                self._check_measure(name, function)

    def _check_measure(self, name: str, function: Callable):
        try:
            with only_checking():
                function(self.model, *self.examples())
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            cause = str(error).rstrip(".")
            raise kind(
                f"`measures` must fit the model and the data. Received: {name!r}, which fails: "
                f"{cause}. Its arguments are set by `functools.partial({name}, ...)`."
            ) from error

    def measure(self) -> dict[str, float]:
        """Return the measures with their standard errors, as logs."""
        logs = {}
        x, y = self.examples()
        for name, function in self._measures.items():
            with self._misfit_warnings[name].remembering():
                result = self.results[name] = function(self.model, x, y)
            # A grid of sigmas makes `local_energy` an array.
            if np.ndim(getattr(result, "value", [])):
                raise ValueError(f"{_NUMBER} Received: {result!r} from {name}")
            logs[name], logs[f"{name}_stderr"] = float(result.value), float(result.stderr)
        return logs


def _named(measure: str | Callable) -> tuple[str, Callable]:
    """Return the name of a measure and its function."""
    if isinstance(measure, str):
        names = sorted(n for n in flatness.__all__ if _gives_number(getattr(flatness, n)))
        if measure not in names:
            raise ValueError(
                f"`measures` must hold functions, or some of the names {names}. "
                f"Received: {measure!r}"
            )
        return measure, functools.partial(getattr(flatness, measure), seed=0)
    function = _underlying(measure)
    if not callable(measure) or not hasattr(function, "__name__"):
        raise ValueError(f"`measures` must hold names or functions. Received: {measure!r}")
    ours = function in [getattr(flatness, name) for name in flatness.__all__]
    if ours and not _gives_number(function):
        raise ValueError(f"{_NUMBER} Received: {measure!r}")
    return function.__name__, measure


def _gives_number(function: Any) -> bool:
    """Return whether something of `flatness` is a function of a model that returns a number."""
    if not inspect.isfunction(function):
        return False
    signature = inspect.signature(function)
    result = signature.return_annotation
    of_model = next(iter(signature.parameters)) == "model"
    return of_model and isinstance(result, type) and issubclass(result, Estimate)


def _underlying(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function
