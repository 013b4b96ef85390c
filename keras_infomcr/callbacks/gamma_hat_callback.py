"""gamma-hat in the logs of `fit`."""

from typing import Any

from keras_infomcr.callbacks.measuring_callback import MeasuringCallback, check_one_tuple
from keras_infomcr.flatness.fisher.gamma_hat import GammaHat
from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


class GammaHatCallback(MeasuringCallback):
    """Log InfoMCR's metric gamma-hat at the end of epochs.

    Adds `gamma_hat`, `gamma_hat_stderr` and `gamma_hat_log_loss_part`, one of the two parts of
    `GammaHat`, to the logs of each epoch, NaN for an epoch without a measurement.
    `keras_infomcr.flatness.plot.gamma_hat(history)` draws them. Put it before the callbacks that
    read them (`CSVLogger`, `TensorBoard`, `EarlyStopping("gamma_hat", mode="min")`,
    `ModelCheckpoint`): a warning names those callbacks that stand before it. It works with any
    `keras.Model`, and leaves the model, its optimizer and all seeds as they are. To compare runs
    with and without a regulariser pass `normalize_softmax=True`, as the paper does: without it the
    value falls as the logits grow. A warning says so if the model does not fit the data, as after
    training has diverged; however small the value, that is no flat minimum.

    Args:
        data: Tuple `(x, y)` of arrays or structures of arrays, or a `tf.data.Dataset`, torch
            `DataLoader` or another iterable of batches `(x, y)`: training data without
            augmentation. The same examples are measured in each epoch. Models of KerasHub
            preprocess them, as they do what `fit` is given.
        num_examples: Integer, at least 1. N', the examples of a trial. Defaults to 100.
        num_trials: Integer, at least 1, or `"auto"`. T, the trials averaged. Defaults to 10; the
            paper has 100.
        normalize_softmax: Boolean, whether to normalise the logits, for a value that compares
            between runs. Needs softmax cross-entropy. Defaults to `False`.
        softmax_scale: Float, greater than 0, the scale of the normalisation. Defaults to 0.04.
        frequency: Integer, at least 1. Measure every so many epochs, and after the last. Defaults
            to 1, which `EarlyStopping` and `ModelCheckpoint` on `gamma_hat` need: their first
            NaN would count as the best.
        training: As for `keras_infomcr.flatness.gamma_hat`. Defaults to `False`.
        chunk_size: As for `keras_infomcr.flatness.gamma_hat`. Defaults to `num_examples`.
        seed: Integer or `None`, of the draw of examples. Defaults to 0, so that runs compare.
        verbose: 0 or 1. With 1, a line is printed for each measurement, and once, after the
            second, what part of an epoch's time it takes (the first compiles). Defaults to 0.
        relative_tolerance: As for `keras_infomcr.flatness.gamma_hat`, which uses it with
            `num_trials="auto"`. Defaults to 0.01.
        loss: As for `keras_infomcr.flatness.gamma_hat`. Defaults to the compiled loss.

    Attributes:
        result: The last `keras_infomcr.flatness.GammaHat`, `None` before the first.

    Raises:
        TypeError: If the data are of a wrong type.
        ValueError: If an argument is out of its range; when training begins, if the data hold
            too few examples, NaN or infinity, or the labels do not fit the loss.

    Example:

    ```python
    model.fit(x, y, epochs=10, callbacks=[GammaHatCallback((x, y), verbose=1)])
    ```

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Eq. 6 (https://arxiv.org/abs/1911.08192).
    """

    names = "gamma_hat", "gamma_hat_stderr", "gamma_hat_log_loss_part"

    def __init__(
        self,
        data: Any,
        num_examples: int = 100,
        num_trials: int | str = 10,
        normalize_softmax: bool = False,
        softmax_scale: float = 0.04,
        frequency: int = 1,
        training: bool = False,
        chunk_size: int | None = None,
        seed: int | None = 0,
        verbose: int = 0,
        relative_tolerance: float = 0.01,
        loss: Any = None,
    ):
        check_one_tuple(data, num_examples)
        super().__init__(data, frequency, verbose)
        self.result = None
        self._settings = TrialSettings(
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

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._estimator = GammaHatEstimator(self.model, *self.examples(), self._settings)
        self._prepared = False
        self._prepare()

    def on_train_batch_begin(self, batch, logs=None):
        self._prepare()

    def _prepare(self):
        """Check labels against outputs as soon as there are any: some models wait for a batch."""
        # In this order: on JAX Keras reattaches the state of `fit` wherever `self.model` is used.
        if not self._prepared and self.model.built:
            self._estimator.prepare()
            self._estimator.warn_of_other_losses()
            self._prepared = True

    def measure(self):
        """Return gamma-hat with its standard error and one of its parts, as logs."""
        self.result = result = GammaHat.of_parts(self._estimator.measure())
        return dict(zip(self.names, (result.value, result.stderr, result.log_loss_part)))
