"""InfoMCR's metric gamma-hat: the log-determinant of the Fisher information of a few examples."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_infomcr import validation
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


@dataclasses.dataclass(frozen=True)
class GammaHat(Estimate):
    """The result of `gamma_hat`: natural logarithms, summed over the N' examples of a trial.

    Attributes:
        value: Float, gamma-hat: the mean of ln|xi| over the trials. Smaller is flatter.
        stderr: Float, its standard error over the trials, NaN for a single trial.
        samples: Array `[T]`, ln|xi| of each trial.
        trials: The same array, by the paper's word for it.
        log_loss_part: Float, the mean of 2 sum_i ln sigmoid(-m_i): how well the examples are
            fitted. 0 if the loss is no cross-entropy.
        geometry_part: Float, the mean of ln|G|, G the Gram matrix of the gradients of the
            log-odds m_i. `value` is the sum of the two parts.
    """

    log_loss_part: float
    geometry_part: float

    @property
    def trials(self) -> np.ndarray:
        return self.samples

    @classmethod
    def of_parts(cls, parts: np.ndarray) -> "GammaHat":
        """Return the statistics of trials.

        Args:
            parts: Array `[T, 2]`, the two parts of each trial.

        Returns:
            A `GammaHat`.
        """
        log_loss, geometry = (float(part) for part in parts.mean(axis=0))
        return cls.of(parts.sum(axis=1), log_loss_part=log_loss, geometry_part=geometry)


def gamma_hat(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    num_examples: int = 100,
    num_trials: int | str = 100,
    relative_tolerance: float = 0.01,
    normalize_softmax: bool = False,
    softmax_scale: float = 0.04,
    training: bool = False,
    chunk_size: int | None = None,
    seed: int | None = None,
    loss: Any = None,
    verbose: int = 0,
) -> GammaHat:
    """Measure gamma-hat of a model: ln|J J^T|, J the gradients of the losses of a few examples.

        gamma-hat = (1/T) sum_t ln|xi^t|,    xi^t = J J^T,    J_i = grad l_i

    over T trials of N' examples each. For cross-entropy it is computed from the log-odds m_i of
    the true classes, ln|xi| = 2 sum_i ln sigmoid(-m_i) + ln|G| with G the Gram matrix of the
    grad m_i, which stays right when the losses vanish. Labels count by their largest entry. For
    any other loss J holds the gradients of the loss itself, and a warning says that this is no
    gamma-hat of a classifier. The model, its state, its optimizer and all seeds are left as they
    are.

    Whatever the loss, l_i is the loss of the example alone, as Fisher information is made of the
    gradients of -ln p(y_i|x_i). Label smoothing, `loss_weights`, `add_loss`, penalties on weights
    and activities and sample weights have no part in it. (The paper trains with label smoothing
    and measures with one-hot labels, Sec. 3.1.) If the model has several outputs, l_i is the sum
    of their losses, weighted by `loss_weights`, for nothing else makes one loss of them. Losses
    other than the cross-entropy of one output take soft labels as they are.

    What is compiled is kept as long as the model lives, and compiled anew after `model.compile`.

    To compare runs with and without a regulariser pass `normalize_softmax=True`, as the paper
    does: without it the value falls as the logits grow, and is least for a run that has diverged.
    A warning says so if the model does not fit its data (a mean loss above twice the loss of a
    uniform guess).

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Eq. 5 and 6 (https://arxiv.org/abs/1911.08192). The paper's code
    reports half of this, with `training=True, chunk_size=10`.

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: Array or structure of arrays `[N, ...]`; or, without `y`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader` or another iterable of batches `(x, y)`,
            of which the first `num_examples * num_trials` examples are read.
        y: Labels: integers, one-hot or soft; `None` if `x` gives batches.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        num_trials: Integer, at least 1, or `"auto"`. T, the trials averaged; the standard error
            falls as its square root. Trials share no example until all have been used. With
            `"auto"`, 5 to 100: as many as `relative_tolerance` asks for. Defaults to 100, as in
            the paper; all other measures of trials average 10.
        relative_tolerance: Float, greater than 0: with `num_trials="auto"`, the standard error
            that is good enough, as a fraction of gamma-hat's size. Defaults to 0.01.
        normalize_softmax: Boolean, whether to divide the logits by `softmax_scale` times their
            L2 norm first, as the paper does to compare models trained with and without the
            regulariser. Defaults to `False`.
        softmax_scale: Float, greater than 0. Defaults to 0.04.
        training: Boolean, whether batch normalisation uses the statistics of the chunk, and
            rows hold each loss's gradient through the whole chunk. Defaults to `False`.
        chunk_size: Integer, at least 1, or `None`: examples that go through the model together.
            With `training=False` it does not change the result. Defaults to `num_examples`.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.
        loss: What to measure in place of the compiled loss: a loss of Keras, its name, a function
            of `(y_true, y_pred)`, or a structure of these like the outputs. With it a model can
            be measured that is not compiled, or whose `train_step` or `compute_loss` is its own.
            Pass the same function again rather than a new `lambda`, for which all is compiled
            anew. Defaults to the compiled loss.
        verbose: 0 or 1. With 1, a progress bar counts the trials. Defaults to 0.

    Returns:
        A `GammaHat`. A singular xi gives -inf, with a warning that names the cause.

    Raises:
        TypeError: If `model` or `x` is of a wrong type.
        ValueError: If an argument is out of its range, the model is not compiled or not built,
            the data hold too few examples, NaN or infinity, or the labels do not fit the loss:
            for sparse cross-entropy, if one stands for no class.

    Example:

    ```python
    result = gamma_hat(model, x_train, y_train, num_trials=10, seed=0)
    print(f"{result.value:.1f} +- {result.stderr:.1f}")
    ```
    """
    validation.one_of(0, 1, verbose=verbose)
    settings = TrialSettings(
        num_examples=num_examples,
        num_trials=num_trials,
        relative_tolerance=relative_tolerance,
        normalize_softmax=normalize_softmax,
        softmax_scale=softmax_scale,
        training=training,
        chunk_size=chunk_size,
        seed=seed,
        loss=loss,
    )
    return GammaHat.of_parts(GammaHatEstimator(model, x, y, settings).measure(verbose))
