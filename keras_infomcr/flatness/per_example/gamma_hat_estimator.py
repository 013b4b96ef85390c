"""The gradients of the examples of trials, measured again and again on the same examples."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_infomcr import backend
from keras_infomcr.core.log_determinant import log_determinant
from keras_infomcr.flatness.data.examples import draw_trials, num_copies, read_examples
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.loss.example_values import (
    has_cross_entropy,
    warn_of_inverted_probabilities,
)
from keras_infomcr.flatness.loss.measured_loss import resolved_loss
from keras_infomcr.flatness.per_example.model_trial_grams import model_trial_grams
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings
from keras_infomcr.flatness.running.checks import (
    check_built,
    check_compiled,
    misfit_warning,
    warn,
)
from keras_infomcr.flatness.running.only_checking import end_of_checks
from keras_infomcr.flatness.running.progress import progress_bar
from keras_infomcr.labels import check_labels
from keras_infomcr.objective import Objective

# With `num_trials="auto"`.
_FEWEST_TRIALS, _MOST_TRIALS = 5, 100


class GammaHatEstimator:
    """Measures gamma-hat of a model as it trains, and what else the same gradients say.

    The data and the draw of trials are its own. What it compiles is the model's, and serves all
    estimators of it.

    Args:
        model: A `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        settings: `TrialSettings`.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any, settings: TrialSettings):
        check_compiled(model, settings.loss)
        self.model = model
        self._settings = settings
        self._draw_trials(x, y)
        self._grams = None
        self._warned = self._warned_of_loss = False
        self._misfit_warning = misfit_warning()

    def _draw_trials(self, x: Any, y: Any) -> None:
        num_examples, count = self._settings.num_examples, self._settings.num_trials
        count = _MOST_TRIALS if self._settings.is_automatic else count
        self._x, self._y = read_examples(x, y, limit=num_examples * count)
        self._trials = draw_trials(self._size, num_examples, count, self._settings.seed)

    @property
    def _size(self) -> int:
        """The number of examples that the data hold."""
        return len(keras.tree.flatten(self._x)[0])

    def prepare(self) -> None:
        """Check that the model is built, and the labels against its loss and outputs."""
        check_built(self.model)
        self._loss_bearer = resolved_loss(self.model, self._settings.loss)
        grams = model_trial_grams(self.model, self._loss_bearer, self._x, self._y, self._settings)
        check_labels(self._loss_bearer, self._y, grams.outputs)
        self._labels = grams.values.labels(self._y, grams.outputs)
        if grams.values.inverts:
            warn_of_inverted_probabilities()
        self._grams = grams

    def warn_of_other_losses(self) -> None:
        """Warn, once, of a loss that makes gamma-hat another quantity than the paper's."""
        if self._warned_of_loss or has_cross_entropy(self._loss_bearer):
            return
        self._warned_of_loss = True
        warn(
            "The loss is no cross-entropy, so that gamma_hat is ln|J J^T| of the gradients of the "
            "loss itself. It is no gamma-hat of a classifier, and does not compare with one. "
            f"Received: loss={self._loss_bearer.loss!r}"
        )

    def measure(self, verbose: int = 0) -> np.ndarray:
        """Measure the model as it is now.

        Args:
            verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.

        Returns:
            Array `[T, 2]`, for each trial: the part of the log-losses and ln|G|.
        """
        self._prepare_for_gamma_hat()
        return self._measure(self._parts, verbose, self._is_enough)

    def measure_layers(self, verbose: int = 0) -> np.ndarray:
        """Measure its layers as they are now.

        Args:
            verbose: As for `measure`.

        Returns:
            Array `[T, L]`, for each trial and each of `layers`: ln|xi|.
        """
        self._prepare_for_gamma_hat()
        return self._measure(self._by_layer, verbose)

    def measure_matrices(
        self, statistic: Callable[[np.ndarray], float], verbose: int = 0
    ) -> np.ndarray:
        """Measure a statistic of J J^T.

        Args:
            statistic: Function of an array `[N', N']`, the J J^T of a trial.
            verbose: As for `measure`.

        Returns:
            Array `[T]`, for each trial: the statistic.
        """
        if self._grams is None:
            self.prepare()

        def of_trial(factors, grams):
            slope = np.exp(factors / 2)  # |dl_i/dm_i|
            return statistic(grams.sum(axis=0) * np.outer(slope, slope))

        return self._measure(of_trial, verbose)

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers that have trainable weights."""
        return self._grams.layers

    @property
    def num_weights(self) -> tuple[int, ...]:
        """The numbers of their trainable weights."""
        return self._grams.num_weights

    def _prepare_for_gamma_hat(self) -> None:
        if self._grams is None:
            self.prepare()
        self.warn_of_other_losses()

    def _parts(self, factors: np.ndarray, grams: np.ndarray) -> tuple[float, float]:
        """Return the two parts of ln|xi| of a trial."""
        gram, num_weights = grams.sum(axis=0), sum(self.num_weights)
        geometry, cause = log_determinant(gram, self._grams.epsilon, num_weights)
        if cause and not self._warned:
            self._warned = True
            warn(f"gamma_hat is not finite: {cause}.{self._advice(cause)}")
        return float(np.sum(factors)), geometry

    def _by_layer(self, factors: np.ndarray, grams: np.ndarray) -> list[float]:
        """Return ln|xi| of a trial by the weights of each layer."""
        return [
            np.sum(factors) + log_determinant(gram, self._grams.epsilon, count)[0]
            for gram, count in zip(grams, self.num_weights)
        ]

    def _advice(self, cause: str) -> str:
        """Return what to do about copies in the data where they make the determinant vanish."""
        copies = num_copies(self._x) if "duplicates" in cause else 0
        if not copies:
            return ""
        return (
            f" The data hold {copies} copies of other examples among their {self._size}: keep the "
            "first of each, whose indices are `np.unique(x, axis=0, return_index=True)[1]`."
        )

    def _is_enough(self, parts: list[tuple[float, float]]) -> bool:
        """Return whether the trials so far suffice where their number is automatic."""
        if not self._settings.is_automatic:
            return False
        trials = np.sum(parts, axis=1)
        if not np.all(np.isfinite(trials)):
            return True
        tolerance = self._settings.relative_tolerance * abs(np.mean(trials))
        return len(trials) >= _FEWEST_TRIALS and standard_error(trials) <= tolerance

    def _measure(
        self,
        of_trial: Callable[[np.ndarray, np.ndarray], Any],
        verbose: int,
        is_enough: Callable[[list], bool] = lambda found: False,
    ) -> np.ndarray:
        """Return what a function says of each trial, and warn if the model does not fit them.

        Args:
            of_trial: Function of ln(dl_i/dm_i)^2, `[N']`, and of the Gram matrices of the grad
                m_i by layer, `[L, N', N']`.
            verbose: 0 or 1.
            is_enough: Function of the list of what was found: whether to stop.
        """
        end_of_checks()
        objective = Objective(self.model)
        context = objective.weights(), objective.state()
        target = None if self._settings.is_automatic else len(self._trials)
        found, seen = [], []
        with progress_bar(target, verbose) as progress:
            for values, grams in self._over_trials(context):
                seen.append(values)
                found.append(of_trial(self._grams.values.log_loss_factors(values), grams))
                progress.add(1)
                if is_enough(found):
                    break
        self._warn_of_misfit(context, np.concatenate(seen))
        return np.array(found)

    def _over_trials(self, context: tuple[list, list]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what `TrialGrams` gives for each trial, on several devices at once."""
        devices = backend.devices(self.model)

        def of(rows, device):
            return self._grams(context, self._data(rows), device)

        if len(devices) == 1:
            for rows in self._trials:
                yield of(rows, devices[0])
            return
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            for start in range(0, len(self._trials), len(devices)):
                yield from pool.map(of, self._trials[start:], devices)

    def _data(self, rows: np.ndarray) -> tuple[Any, Any]:
        return keras.tree.map_structure(lambda a: a[rows], (self._x, self._labels))

    def _warn_of_misfit(self, context: tuple[list, list], values: np.ndarray) -> None:
        """Warn if the model does not fit the examples that were measured just now."""
        if self._settings.normalize_softmax:
            # Normalised logits fit however badly the model's own do.
            data, device = self._data(self._trials[0]), backend.devices(self.model)[0]
            values = self._grams.values_without_normalization(context, data, device)
        self._misfit_warning(*self._grams.values.loss_and_guess(values))
