"""InfoMCR's metric gamma-hat: the log-determinant of the Fisher information of a few examples."""

import dataclasses
import math
import warnings
from typing import Any

import keras
import numpy as np

from keras_infomcr import backend, validation
from keras_infomcr.core.log_determinant import log_determinant
from keras_infomcr.flatness.example_values import (
    ExampleLoss,
    example_values,
    predict_with_logits,
)
from keras_infomcr.flatness.examples import read_examples
from keras_infomcr.objective import Objective

# The weights are taken in groups whose rows, of all N' examples, take so many bytes at most; or
# one weight at a time.
_ROW_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class GammaHat:
    """What `gamma_hat` returns. Natural logarithms, summed over the N' examples of a trial.

    Attributes:
        value: Float, gamma-hat: the mean of ln|xi| over the trials. Smaller is flatter.
        stderr: Float, its standard error over the trials, NaN for a single trial.
        trials: Array `[T]`, ln|xi| of each trial.
        log_loss_part: Float, the mean of 2 sum_i ln sigmoid(-m_i): how well the examples are
            fitted. 0 if the loss is no cross-entropy.
        geometry_part: Float, the mean of ln|G|, G the Gram matrix of the gradients of the
            log-odds m_i. `value` is the sum of the two parts.
    """

    value: float
    stderr: float
    trials: np.ndarray
    log_loss_part: float
    geometry_part: float


def gamma_hat(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_examples: int = 100,
    num_trials: int = 100,
    normalize_softmax: bool = False,
    softmax_scale: float = 0.04,
    training: bool = False,
    chunk_size: int | None = None,
    seed: int | None = None,
) -> GammaHat:
    """Measure gamma-hat of a model: ln|J J^T|, J the gradients of the losses of a few examples.

        gamma-hat = (1/T) sum_t ln|xi^t|,    xi^t = J J^T,    J_i = grad l_i

    over T trials of N' examples each. For cross-entropy it is computed from the log-odds m_i of
    the true classes, ln|xi| = 2 sum_i ln sigmoid(-m_i) + ln|G| with G the Gram matrix of the
    grad m_i, which stays right when the losses vanish. Labels count by their largest entry. The
    model, its state, its optimizer and all seeds are left as they are.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Eq. 5 and 6 (https://arxiv.org/abs/1911.08192). The paper's code
    reports half of this, with `training=True, chunk_size=10`.

    Args:
        model: A compiled and built `keras.Model`.
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`,
            of which the first `num_examples * num_trials` examples are read.
        y: Labels: integers, one-hot or soft; `None` if `x` gives batches.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        num_trials: Integer, at least 1. T, the trials averaged; the standard error falls as its
            square root. Trials share no example until all have been used. Defaults to 100.
        normalize_softmax: Boolean, whether to divide the logits by `softmax_scale` times their
            L2 norm first, as the paper does to compare models trained with and without the
            regulariser. Defaults to `False`.
        softmax_scale: Float, greater than 0. Defaults to 0.04.
        training: Boolean, whether batch normalisation uses the statistics of the chunk, and
            rows hold each loss's gradient through the whole chunk. Defaults to `False`.
        chunk_size: Integer, at least 1, or `None`: examples that go through the model together.
            With `training=False` it does not change the result. Defaults to `num_examples`.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.

    Returns:
        A `GammaHat`. A singular xi gives -inf, with a warning that names the cause.

    Raises:
        TypeError: If `model` or `x` is of a wrong type.
        ValueError: If an argument is out of its range, the model is not compiled or not built,
            the data hold too few examples, NaN or infinity, or the labels do not fit the loss.

    Example:

    ```python
    result = gamma_hat(model, x_train, y_train, num_trials=10, seed=0)
    print(f"{result.value:.1f} +- {result.stderr:.1f}")
    ```
    """
    estimator = GammaHatEstimator(
        model,
        x,
        y,
        num_examples=num_examples,
        num_trials=num_trials,
        normalize_softmax=normalize_softmax,
        softmax_scale=softmax_scale,
        training=training,
        chunk_size=chunk_size,
        seed=seed,
    )
    return estimator.measure()


class GammaHatEstimator:
    """Measures gamma-hat of a model as it trains, on the same examples, compiled once.

    Args:
        model: A compiled `keras.Model`.
        x: As for `gamma_hat`.
        y: As for `gamma_hat`.
        **settings: The other arguments of `gamma_hat`, none left out.
    """

    def __init__(self, model, x, y, **settings):
        check_settings(**settings)
        _check_model(model)
        self.model = model
        self.num_examples = settings["num_examples"]
        self.training = settings["training"]
        self.chunk_size = settings["chunk_size"] or self.num_examples
        self._normalization = settings["normalize_softmax"], settings["softmax_scale"]
        self._draw_trials(x, y, settings["num_trials"], settings["seed"])
        self._jacobians = None
        self._warned = False

    def measure(self) -> GammaHat:
        """Measure the model as it is now.

        Returns:
            A `GammaHat`.
        """
        if self._jacobians is None:
            self.prepare()
        parts = np.empty((len(self._trials), 2))
        for i, rows in enumerate(self._trials):
            parts[i] = self._measure_trial(rows)
        trials = parts.sum(axis=1)
        stderr = math.nan
        if len(trials) > 1 and np.all(np.isfinite(trials)):
            stderr = float(np.std(trials, ddof=1)) / math.sqrt(len(trials))
        log_loss, geometry = (float(part) for part in parts.mean(axis=0))
        return GammaHat(float(trials.mean()), stderr, trials, log_loss, geometry)

    def _draw_trials(self, x, y, num_trials, seed):
        self._x, self._y = read_examples(x, y, limit=self.num_examples * num_trials)
        size = len(keras.tree.flatten(self._x)[0])
        if size < self.num_examples:
            raise ValueError(
                "`num_examples` must not exceed the number of examples in the data. "
                f"Received: num_examples={self.num_examples}, {size} examples"
            )
        generator = np.random.default_rng(seed)
        per_pass = size // self.num_examples
        passes = [generator.permutation(size) for _ in range(-(-num_trials // per_pass))]
        trials = [
            order[i * self.num_examples : (i + 1) * self.num_examples]
            for order in passes
            for i in range(per_pass)
        ]
        self._trials = trials[:num_trials]

    def prepare(self):
        """Check that the model is built, and the labels against its loss and outputs."""
        if not self.model.built:
            raise ValueError(
                f"The model must be built. Received: model={self.model!r}. Call it on data first."
            )
        if not self.model.trainable_variables:
            raise ValueError(
                f"The model must have trainable weights. Received: model={self.model!r} without."
            )
        objective = Objective(self.model)
        first = keras.tree.map_structure(lambda a: a[:1], self._x)
        with objective.at(objective.weights(), objective.state(), False) as (predict, _):
            outputs, logits = predict_with_logits(self.model, predict, first)
        self._values = example_values(self.model, outputs, logits, *self._normalization)
        if self.training and isinstance(self._values, ExampleLoss):
            raise ValueError(
                "`training` must be `False` unless the loss is a cross-entropy of one output. "
                f"Received: training=True and loss={self.model.loss!r}"
            )
        self._labels = self._values.labels(self._y, outputs)
        sizes = [math.prod(v.shape) for v in self.model.trainable_variables]
        self._num_weights = sum(sizes)
        self._groups = _group(sizes, _ROW_BYTES // (4 * self.num_examples))
        self._jacobians = [self._jacobian(objective, group) for group in self._groups]

    def _jacobian(self, objective, group):
        def values(weights, context, x, y):
            every, state = context
            every = [*every[: group.start], *weights, *every[group.stop :]]
            with objective.at(every, state, self.training) as (predict, _):
                return self._values(x, y, *predict_with_logits(self.model, predict, x))

        return backend.jacobian(values, self.training, compiled=not self.model.run_eagerly)

    def _measure_trial(self, rows):
        """Return the two parts of ln|xi| on the examples of a trial."""
        chunks = [
            keras.tree.map_structure(lambda a, r=rows[i : i + self.chunk_size]: a[r], self._data)
            for i in range(0, len(rows), self.chunk_size)
        ]
        gram = np.zeros((len(rows), len(rows)))
        objective = Objective(self.model)
        context = weights, _ = objective.weights(), objective.state()
        for group, jacobian in zip(self._groups, self._jacobians):
            values, gradients = zip(*(jacobian(weights[group], context, *c) for c in chunks))
            for parts in zip(*gradients):
                parts = map(keras.ops.convert_to_numpy, parts)
                rows_of_chunks = [p.reshape(len(p), -1) for p in parts]
                matrix = np.concatenate(rows_of_chunks) if len(chunks) > 1 else rows_of_chunks[0]
                gram += _gram(matrix)
        values = np.concatenate([keras.ops.convert_to_numpy(v) for v in values]).astype("float64")
        log_loss = float(np.sum(self._values.log_loss_factors(values)))
        epsilon = float(np.spacing(matrix.dtype.type(1)))
        geometry, cause = log_determinant(gram, epsilon, self._num_weights)
        if cause and not self._warned:
            self._warned = True
            warnings.warn(f"gamma_hat is not finite: {cause}.", stacklevel=4)
        return log_loss, geometry

    @property
    def _data(self):
        return self._x, self._labels


def check_settings(
    *, num_examples, num_trials, normalize_softmax, softmax_scale, training, chunk_size, seed
):
    """Raise a `ValueError` if a setting of `gamma_hat` is out of its range."""
    validation.integer(minimum=1, num_examples=num_examples, num_trials=num_trials)
    validation.boolean(normalize_softmax=normalize_softmax, training=training)
    validation.positive(softmax_scale=softmax_scale)
    if chunk_size is not None:
        validation.integer(minimum=1, chunk_size=chunk_size)
    if seed is not None:
        validation.integer(minimum=0, seed=seed)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r} (of type {type(model)})"
        )
    if not model.compiled or model.loss is None:
        raise ValueError(
            "The model must be compiled with a loss. "
            f"Received: model={model!r}, loss={model.loss!r}. Call `model.compile(loss=...)`."
        )


def _group(sizes, limit):
    """Cut the list of weights into slices of at most `limit` numbers, at least one weight each."""
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            groups.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*groups, slice(start, len(sizes))]


def _gram(matrix, width=2**16):
    """Return matrix @ matrix.T in float64, a few columns at a time."""
    gram = np.zeros((len(matrix), len(matrix)))
    for start in range(0, matrix.shape[1], width):
        columns = matrix[:, start : start + width].astype("float64")
        with np.errstate(invalid="ignore"):  # NaN is reported with its cause by `gamma_hat`
            gram += columns @ columns.T
    return gram
