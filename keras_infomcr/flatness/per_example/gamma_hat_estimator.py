"""Gamma-hat of a model, measured again and again on the same examples."""

import concurrent.futures

import keras
import numpy as np

from keras_infomcr import backend
from keras_infomcr.core.log_determinant import log_determinant
from keras_infomcr.flatness.data.examples import draw_trials, num_copies, read_examples
from keras_infomcr.flatness.estimate import standard_error
from keras_infomcr.flatness.loss.compiled_loss import build_compiled_loss
from keras_infomcr.flatness.loss.example_values import (
    CategoricalLogOdds,
    ExampleLoss,
    example_values,
    has_cross_entropy,
)
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.per_example.taps import Taps
from keras_infomcr.flatness.per_example.trial_grams import TrialGrams
from keras_infomcr.flatness.running.checks import MisfitWarning, check_built, check_compiled, warn
from keras_infomcr.flatness.running.shared import end_of_checks, shared
from keras_infomcr.labels import check_labels
from keras_infomcr.objective import Objective

# With `num_trials="auto"`.
_FEWEST_TRIALS, _MOST_TRIALS = 5, 100


def shared_estimator(model, x, y, settings):
    """Return a `GammaHatEstimator`, the one that `sharing` keeps for these data and settings."""
    name = "gamma_hat", *settings.items()
    return shared(name, lambda: GammaHatEstimator(model, x, y, **settings), model, x, y)


class GammaHatEstimator:
    """Measures gamma-hat of a model as it trains, compiled once.

    Args:
        model: A `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        **settings: The other arguments of `gamma_hat`, none left out.
    """

    def __init__(self, model, x, y, **settings):
        check_compiled(model)
        self.model = model
        self._settings = settings
        self._draw_trials(x, y)
        self._grams = None
        self._warned = self._warned_of_loss = False
        self._misfit_warning = MisfitWarning()

    def _draw_trials(self, x, y):
        num_examples, count = self._settings["num_examples"], self._settings["num_trials"]
        count = _MOST_TRIALS if count == "auto" else count
        self._x, self._y = read_examples(x, y, limit=num_examples * count)
        size = len(keras.tree.flatten(self._x)[0])
        self._trials = draw_trials(size, num_examples, count, self._settings["seed"])

    def measure(self):
        """Measure the model as it is now.

        Returns:
            Array `[T, 2]`: of each trial, the part of the log-losses and ln|G|.
        """
        if self._grams is None:
            self.prepare()
        self.warn_of_other_losses()
        parts = []
        for factors, grams in self._measured():
            log_loss = float(np.sum(factors))
            gram, num_weights = grams.sum(axis=0), sum(self.num_weights)
            geometry, cause = log_determinant(gram, self._grams.epsilon, num_weights)
            if cause and not self._warned:
                self._warned = True
                warn(f"gamma_hat is not finite: {cause}.{self._advice(cause)}")
            parts.append((log_loss, geometry))
            if self._settings["num_trials"] == "auto" and self._enough(np.sum(parts, axis=1)):
                break
        self._warn_of_misfit()
        return np.array(parts)

    def _advice(self, cause):
        """Return what to do about copies in the data where they make the determinant vanish."""
        copies = num_copies(self._x) if "duplicates" in cause else 0
        if not copies:
            return ""
        return (
            f" The data hold {copies} copies of other examples among their "
            f"{len(keras.tree.flatten(self._x)[0])}: keep the first of each, those of "
            "`np.unique(x, axis=0, return_index=True)[1]`."
        )

    def measure_layers(self):
        """Measure its layers as they are now.

        Returns:
            Array `[T, L]`: ln|xi| of each trial and each of `layers`.
        """
        if self._grams is None:
            self.prepare()
        self.warn_of_other_losses()
        trials = [
            [
                np.sum(factors) + log_determinant(gram, self._grams.epsilon, count)[0]
                for gram, count in zip(grams, self.num_weights)
            ]
            for factors, grams in self._measured()
        ]
        self._warn_of_misfit()
        return np.array(trials)

    def measure_grams(self):
        """Measure the model as it is now.

        Yields:
            T arrays `[N', N']`: of each trial, J J^T.
        """
        if self._grams is None:
            self.prepare()
        for factors, grams in self._measured():
            slope = np.exp(factors / 2)
            yield grams.sum(axis=0) * np.outer(slope, slope)
        self._warn_of_misfit()

    @property
    def layers(self):
        """The paths of the layers that have trainable weights."""
        return self._grams.layers

    @property
    def num_weights(self):
        """The numbers of their trainable weights."""
        return self._grams.num_weights

    def _measured(self):
        """Yield the logarithms of (dl_i/dm_i)^2 and the Gram matrices of the grad m_i, by trial."""
        end_of_checks()
        objective = Objective(self.model)
        context = objective.weights(), objective.state()
        self._seen = []

        def measured(rows, device):
            data = keras.tree.map_structure(lambda a: a[rows], (self._x, self._labels))
            values, grams = self._grams(context, data, device)
            self._seen.append(values)
            return self._values.log_loss_factors(values), grams

        devices = backend.devices(self.model)
        if len(devices) == 1:
            for rows in self._trials:
                yield measured(rows, devices[0])
            return
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            for start in range(0, len(self._trials), len(devices)):
                yield from pool.map(measured, self._trials[start:], devices)

    def _warn_of_misfit(self):
        """Warn if the model does not fit the examples that were measured just now."""
        if self._settings["normalize_softmax"]:
            values = self._without_normalization(self._trials[0])
        else:
            values = np.concatenate(self._seen)
        self._misfit_warning(*self._values.loss_and_guess(values))

    def _without_normalization(self, rows):
        """Return the log-odds of some examples by the logits as they are."""
        objective = Objective(self.model)
        data = keras.tree.map_structure(lambda a: a[rows], (self._x, self._labels))
        x, y = keras.tree.map_structure(keras.ops.convert_to_tensor, data)
        with objective.at(objective.weights(), objective.state(), False) as (predict, _):
            outputs, logits = predict_with_logits(self.model, predict, x)
        values = CategoricalLogOdds(self._values.from_logits, scale=None)
        return keras.ops.convert_to_numpy(values(x, y, outputs, logits)).astype("float64")

    def _enough(self, trials):
        if not np.all(np.isfinite(trials)):
            return True
        tolerance = self._settings["relative_tolerance"] * abs(np.mean(trials))
        return len(trials) >= _FEWEST_TRIALS and standard_error(trials) <= tolerance

    def prepare(self):
        """Check that the model is built, and the labels against its loss and outputs."""
        check_built(self.model)
        settings = self._settings
        taps = Taps(self.model)
        outputs, logits = self._predict(taps, 1)
        check_labels(self.model, self._y, outputs)
        build_compiled_loss(self.model, self._y, outputs)
        normalization = settings["normalize_softmax"], settings["softmax_scale"]
        self._values = example_values(self.model, outputs, logits, *normalization)
        other_loss = isinstance(self._values, ExampleLoss)
        if settings["training"] and other_loss:
            raise ValueError(
                "`training` must be `False` unless the loss is a cross-entropy of one output. "
                f"Received: training=True and loss={self.model.loss!r}"
            )
        self._labels = self._values.labels(self._y, outputs)
        num_examples = settings["num_examples"]
        chunk_size = settings["chunk_size"] or num_examples
        one_by_one = (
            settings["training"]
            or other_loss
            or chunk_size < num_examples
            or self.model.run_eagerly
        )
        if one_by_one or self._coupled(taps, outputs, logits):
            taps.layers = []
        self._grams = TrialGrams(
            self.model, self._values, taps, num_examples, settings["training"], chunk_size
        )

    def warn_of_other_losses(self):
        """Warn, once, of a loss that makes gamma-hat another quantity than the paper's."""
        if self._warned_of_loss or has_cross_entropy(self.model):
            return
        self._warned_of_loss = True
        warn(
            "The loss is no cross-entropy, so that gamma_hat is ln|J J^T| of the gradients of the "
            "loss itself. It is no gamma-hat of a classifier, and does not compare with one. "
            f"Received: loss={self.model.loss!r}"
        )

    def _predict(self, taps, count):
        """Return outputs and logits of the first examples, seen by the taps."""
        objective = Objective(self.model)
        x = keras.tree.map_structure(lambda a: a[:count], self._x)
        with objective.at(objective.weights(), objective.state(), False) as (predict, scope):
            with taps.noting(scope, count):
                return predict_with_logits(self.model, predict, x)

    def _coupled(self, taps, *of_first):
        """Return whether an example's value depends on the one beside it, as with batch norm."""
        if len(keras.tree.flatten(self._x)[0]) == 1:
            return False
        alone, beside = (
            keras.ops.convert_to_numpy(self._values_of(count, *of_examples))[0]
            for count, of_examples in ((1, of_first), (2, self._predict(taps, 2)))
        )
        return taps.coupled() or not np.isclose(alone, beside, rtol=1e-3, atol=1e-3)

    def _values_of(self, count, outputs, logits):
        x, y = keras.tree.map_structure(
            lambda a: keras.ops.convert_to_tensor(a[:count]), (self._x, self._labels)
        )
        return self._values(x, y, outputs, logits)
