"""Per-example values whose gradients are the rows of gamma-hat's Jacobian.

For cross-entropy l = softplus(-m) with m the log-odds of the true class, so that
grad l = -sigmoid(-m) grad m. The factor is taken out of the determinant: the rows grad m keep
their size where p_c rounds to 1 and grad l to 0.
"""

import inspect
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.compiled_loss import compiled_loss, losses_by_example
from keras_infomcr.flatness.loss.logits import Logits
from keras_infomcr.flatness.running.checks import warn
from keras_infomcr.layers.logit_normalization import normalize_logits
from keras_infomcr.objective import losses_of


def example_values(
    model: keras.Model,
    outputs: Any,
    logits: Logits,
    normalize_softmax: bool,
    softmax_scale: float,
) -> "CategoricalLogOdds | ExampleLoss":
    """Choose the per-example values that fit the loss of a model.

    Args:
        model: What `resolved_loss` returns for the model: it bears the loss.
        outputs: The model's outputs on an example.
        logits: `Logits` of that call.
        normalize_softmax: Boolean, whether to normalise the logits.
        softmax_scale: Float, the scale of the normalisation.

    Returns:
        A `CategoricalLogOdds`, a `BinaryLogOdds` or an `ExampleLoss`.

    Raises:
        ValueError: If logits are to be normalised and the loss is no softmax cross-entropy.
    """
    loss, kind = kind_of_loss(model, outputs)
    # A sequence of classes has no one true class: the loss itself is taken.
    categorical = kind == "categorical" and len(_only(outputs).shape) == 2
    binary = kind == "binary"
    if normalize_softmax and not categorical:
        raise ValueError(
            "`normalize_softmax` needs a model compiled with one softmax cross-entropy. "
            f"Received: normalize_softmax=True and loss={model.loss!r}"
        )
    if not categorical and not binary:
        return ExampleLoss(model)
    from_logits = getattr(loss, "from_logits", False)
    inverts = not from_logits and logits.of(_only(outputs), kind) is None
    if binary:
        return BinaryLogOdds(from_logits, inverts)
    scale = softmax_scale if normalize_softmax else None
    return CategoricalLogOdds(from_logits, inverts, _only(outputs).shape[-1], scale)


def warn_of_inverted_probabilities() -> None:
    """Warn that logits are computed from probabilities, which is not what every model means."""
    warn(
        "The model does not end in a softmax or sigmoid that Keras can look behind, so its "
        "outputs are taken as probabilities p and its logits as ln p, or ln p - ln(1 - p) "
        "for one output. Let the model return logits and compile it with a loss with "
        "`from_logits=True` if that is wrong."
    )


def kind_of_loss(model: keras.Model, outputs: Any) -> tuple[Any, str | None]:
    """Return the one loss of the model, or `None`, and its kind.

    The kind is `"categorical"` for softmax cross-entropy, `"binary"` for sigmoid cross-entropy of
    one output, or `None`.
    """
    losses = losses_of(model)
    single = len(losses) == 1 and len(keras.tree.flatten(outputs)) == 1
    loss = keras.losses.get(losses[0]) if single else None
    # A function of the user's may bear the name of one of Keras's.
    of_user = inspect.isfunction(loss) and not loss.__module__.startswith("keras.")
    name = "" if of_user else _name(loss)
    usual = getattr(loss, "axis", -1) == -1 and getattr(loss, "ignore_class", None) is None
    if usual and name in ("sparsecategoricalcrossentropy", "categoricalcrossentropy"):
        return loss, "categorical"
    if usual and name == "binarycrossentropy" and math.prod(_only(outputs).shape[1:]) == 1:
        return loss, "binary"
    return loss, None


def has_cross_entropy(model: keras.Model) -> bool:
    """Return whether a compiled loss of the model is a cross-entropy, by its name."""
    losses = [keras.losses.get(x) for x in losses_of(model) if x is not None]
    return any("crossentropy" in _name(loss) for loss in losses)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__).replace("_", "").lower()


class CategoricalLogOdds:
    """m = z_c - logsumexp_{k != c} z_k of the true class c, for softmax cross-entropy.

    Args:
        from_logits: Boolean, whether the model's outputs are logits; else probabilities.
        inverts: Boolean, whether the logits behind the probabilities are not known, so that the
            activation is inverted.
        num_classes: Integer, K.
        scale: Float, the scale of the normalisation of the logits, or `None` for none.
    """

    kind = "categorical"

    def __init__(self, from_logits: bool, inverts: bool, num_classes: int, scale: float | None):
        self.from_logits = from_logits
        self.inverts = inverts
        self.num_classes = num_classes
        self.scale = scale

    def without_normalization(self) -> "CategoricalLogOdds":
        """Return the log-odds by the logits as they are."""
        return CategoricalLogOdds(self.from_logits, self.inverts, self.num_classes, None)

    def labels(self, y: Any, outputs: Any) -> Any:
        """Return classes as integers, of labels that are integers, one-hot or soft."""
        y, outputs = _only(y), _only(outputs)
        if len(outputs.shape) != 2 or outputs.shape[-1] < 2:
            raise ValueError(
                "The model must give a row of at least 2 class scores an example. "
                f"Received: outputs of shape {tuple(outputs.shape)}"
            )
        num_classes = self.num_classes
        is_number = np.issubdtype(y.dtype, np.number)
        if y.ndim == 2 and y.shape[-1] == num_classes and is_number and np.all(y.max(-1) > 0):
            return np.argmax(y, axis=-1).astype("int32")
        flat = y.reshape(-1) if y.size == len(y) else y
        fits = flat.ndim == 1 and is_number
        if not (fits and np.all((flat >= 0) & (flat < num_classes) & (flat == np.floor(flat)))):
            raise ValueError(
                f"`y` must hold integers from 0 to {num_classes - 1}, or rows of {num_classes} "
                f"probabilities. Received: y of shape {y.shape} and dtype {y.dtype}"
                + (f", from {flat.min()} to {flat.max()}" if fits else "")
            )
        return flat.astype("int32")

    def __call__(self, x: Any, y: Any, outputs: Any, logits: Logits) -> Any:
        logits = self.class_logits(outputs, logits)
        if self.scale is not None:
            logits = normalize_logits(logits, self.scale)
        true = ops.equal(ops.arange(logits.shape[-1]), ops.expand_dims(y, -1))
        zeros = ops.zeros_like(logits)
        others = ops.logsumexp(ops.where(true, zeros - np.inf, logits), axis=-1)
        return ops.sum(ops.where(true, logits, zeros), axis=-1) - others

    def log_loss_factors(self, values: np.ndarray) -> np.ndarray:
        """Return ln(dl/dm)^2 of each example: 2 ln sigmoid(-m)."""
        with np.errstate(invalid="ignore"):  # NaN is reported with its cause by `gamma_hat`
            return -2 * np.logaddexp(0, values)

    def loss_and_guess(self, values: np.ndarray) -> tuple[float, float]:
        """Return the mean loss of examples and the loss of a uniform guess."""
        return -np.mean(self.log_loss_factors(-values)) / 2, math.log(self.num_classes)

    def class_logits(self, outputs: Any, logits: Logits) -> Any:
        """Return the logits of the outputs, by the inverse of the activation if need be."""
        known = _only(outputs)
        if not self.from_logits:
            known = logits.of(known, self.kind)
        if known is not None:
            return ops.cast(known, backend.widest_float())
        return self._inverse(ops.cast(_only(outputs), backend.widest_float()))

    def _inverse(self, probabilities: Any) -> Any:
        return ops.log(probabilities)


class BinaryLogOdds(CategoricalLogOdds):
    """m = z for the positive class and -z for the negative, for sigmoid cross-entropy.

    Args:
        from_logits: Boolean, whether the model's outputs are logits; else probabilities.
        inverts: Boolean, as for `CategoricalLogOdds`.
    """

    kind = "binary"

    def __init__(self, from_logits: bool, inverts: bool):
        super().__init__(from_logits, inverts, num_classes=2, scale=None)

    def labels(self, y: Any, outputs: Any) -> Any:
        """Return the signs, 1 for labels of at least 0.5, else -1."""
        y = _only(y)
        is_number = np.issubdtype(y.dtype, np.number) or y.dtype == bool
        if y.size != len(y) or not is_number or not np.all((y >= 0) & (y <= 1)):
            raise ValueError(
                "`y` must hold one number from 0 to 1 an example. "
                f"Received: y of shape {y.shape} and dtype {y.dtype}"
                + (f", from {y.min()} to {y.max()}" if is_number else "")
            )
        return np.where(y.reshape(-1) >= 0.5, 1.0, -1.0)

    def __call__(self, x: Any, y: Any, outputs: Any, logits: Logits) -> Any:
        logits = self.class_logits(outputs, logits)
        return ops.reshape(logits, (-1,)) * ops.cast(y, logits.dtype)

    def _inverse(self, probabilities: Any) -> Any:
        return ops.log(probabilities) - ops.log1p(-probabilities)


class ExampleLoss:
    """The loss of each example, for any other loss: see `compiled_loss` with `of_example=True`.

    Args:
        model: What `resolved_loss` returns for the model: it bears the loss.
        together: Boolean, whether it is called with many examples, as losses that
            `are_by_example` can be, or with one. Defaults to `False`.
    """

    inverts = False

    def __init__(self, model: keras.Model, together: bool = False):
        self.model = model
        self.together = together

    def labels(self, y: Any, outputs: Any) -> Any:
        """Return the labels as they are."""
        return y

    def __call__(self, x: Any, y: Any, outputs: Any, logits: Logits) -> Any:
        if self.together:
            losses = losses_by_example(self.model, y, outputs, logits)
        else:
            loss, _ = compiled_loss(self.model, x, y, outputs, logits, of_example=True)
            losses = ops.reshape(loss, (1,))
        return ops.cast(losses, backend.widest_float())

    def log_loss_factors(self, values: np.ndarray) -> np.ndarray:
        """Return zeros: the rows are gradients of the loss itself."""
        return np.zeros_like(values)

    def loss_and_guess(self, values: np.ndarray) -> tuple[float, float]:
        """Return the mean loss of examples, and infinity: no guess is known to compare with."""
        return np.mean(values), math.inf


def _only(structure: Any) -> Any:
    """Return the one leaf of a structure."""
    return keras.tree.flatten(structure)[0]
