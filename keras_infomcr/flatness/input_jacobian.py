"""The paper's robustness: how strongly a model's probabilities depend on its input."""

import math
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend, validation
from keras_infomcr.core.spectral_norms import spectral_norms
from keras_infomcr.flatness.data.examples import trial_batches
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.loss.example_values import kind_of_loss
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.loss.measured_loss import resolved_loss
from keras_infomcr.flatness.running.checks import check_built, check_sampling
from keras_infomcr.flatness.running.compiled_for import compiled_for
from keras_infomcr.flatness.running.only_checking import end_of_checks
from keras_infomcr.flatness.running.progress import progress_bar
from keras_infomcr.objective import Objective


def input_jacobian_norm(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    norm: str = "spectral",
    num_examples: int | None = None,
    chunk_size: int = 128,
    seed: int | None = None,
    loss: Any = None,
    verbose: int = 0,
) -> Estimate:
    """Compute the mean squared norm of the Jacobian of the softmax output by the input.

        (1 / N) sum_x ||d f(x) / d x||^2,    f the probabilities of the K classes

    exactly, by the eigenvalues of the K x K Gram matrix of each example. Where the loss is no
    cross-entropy of one output, f is the output itself.

    Reference: Jia and Su, "Information-Theoretic Local Minima Characterization and
    Regularization", ICML 2020, Sec. 7.1, "robustness" (https://arxiv.org/abs/1911.08192).

    Args:
        model: A built `keras.Model`, compiled with a loss unless `loss` is given.
        x: As for `hessian_trace`; floating-point numbers.
        y: As for `hessian_trace`, but not used: with an array or a dictionary it may be `None`.
        norm: `"spectral"`, the largest singular value, or `"frobenius"`. Defaults to
            `"spectral"`.
        num_examples: Integer, at least 1: so many examples are drawn; or `None`: all are
            measured. Defaults to `None`.
        chunk_size: Integer, at least 1: examples that go through the model together. The
            Jacobians of a batch are held in memory, K times its size. Defaults to 128.
        seed: Integer or `None`, of the draw of examples. Defaults to a new draw each time.
        loss: As for `hessian_trace`. It says whether the outputs are probabilities or logits.
            Defaults to the compiled loss.
        verbose: 0 or 1. With 1, a progress bar counts the batches. Defaults to 0.

    Returns:
        An `Estimate`, its samples the squared norms of the examples, which its standard error
        takes for a sample of more.

    Raises:
        TypeError: As `hessian_trace`, and if an input holds integers.
        ValueError: As `hessian_trace`.

    Example:

    ```python
    result = input_jacobian_norm(model, x_train, num_examples=1000, seed=0)
    ```
    """
    validation.one_of("spectral", "frobenius", norm=norm)
    check_sampling(num_examples, 1, chunk_size, seed, verbose)
    loss_bearer = resolved_loss(model, loss)
    check_built(model)
    if y is None and (isinstance(x, dict) or hasattr(x, "__array__")):
        y = np.zeros(len(keras.tree.flatten(x)[0]))  # labels of arrays are checked, not used
    (data,) = trial_batches(x, y, num_examples, 1, chunk_size, seed)
    samples = []
    with progress_bar(None, verbose) as progress:
        for inputs, _ in data:
            grams = _input_jacobian(model, loss_bearer, inputs).grams(inputs)
            if norm == "spectral":
                samples.append(spectral_norms(grams))
            else:
                samples.append(np.trace(grams, axis1=1, axis2=2))
            progress.add(1)
    return Estimate.of(np.concatenate(samples))


def _input_jacobian(model: keras.Model, loss_bearer: keras.Model, x: Any) -> "InputJacobian":
    """Return the `InputJacobian` that is kept for a model and a structure of inputs."""
    structure = keras.tree.map_structure(lambda a: f"{a.dtype}{a.shape[1:]}", x)
    key = "input_jacobian", repr(structure), loss_bearer
    return compiled_for(model, key, lambda: InputJacobian(model, loss_bearer, x))


class InputJacobian:
    """The Jacobians of the probabilities by the inputs.

    Args:
        model: A built `keras.Model`.
        loss_bearer: What `resolved_loss` returns for the model.
        x: Structure of NumPy arrays `[B, ...]`, inputs of the kind that it will be asked for.

    Raises:
        TypeError: If an input holds integers.
    """

    def __init__(self, model: keras.Model, loss_bearer: keras.Model, x: Any):
        inputs = keras.tree.flatten(x)
        kinds = [a.dtype.name for a in inputs if a.dtype.kind in "iub"]
        if kinds:
            raise TypeError(
                "The inputs must be floating-point numbers, to be differentiated by. "
                f"Received: x of dtype {kinds[0]}. Cast images, or measure from embeddings on."
            )
        end_of_checks()
        self._model = model
        self._loss_bearer = loss_bearer
        self._objective = Objective(model)
        self._structure = keras.tree.map_structure(lambda a: 0, x)
        self._lock = threading.Lock()
        # An example's own row is the derivative of the batch's sum: in inference none sees others.
        self._rows = backend.jacobian(self._sums, compiled=not model.run_eagerly)
        self._of_batch = self._values if model.run_eagerly else backend.compiled(self._values)
        # What the model ends in, one example tells, before a framework traces.
        first = [ops.convert_to_tensor(a[:1]) for a in inputs]
        self._slopes = self._values_and_slopes(first, self._context())[1]

    def grams(self, x: Any) -> np.ndarray:
        """Return J J^T of each example.

        Args:
            x: Structure of NumPy arrays `[B, ...]`.

        Returns:
            Float64 array `[B, K, K]`.
        """
        end_of_checks()
        context = self._context()
        tensors = [ops.convert_to_tensor(a) for a in keras.tree.flatten(x)]
        device = backend.devices(self._model)[0]
        _, rows = backend.on_device(device, self._rows, tensors, context)
        rows = [ops.convert_to_numpy(r) for r in rows]
        flat = [r.reshape(*r.shape[:2], math.prod(r.shape[2:])).swapaxes(0, 1) for r in rows]
        grams = sum(f @ f.swapaxes(1, 2) for f in (f.astype("float64") for f in flat))
        if self._slopes is None:
            return grams
        logits = ops.convert_to_numpy(backend.on_device(device, self._of_batch, tensors, context))
        slopes = self._slopes(logits.astype("float64"))
        return slopes @ grams @ slopes

    def _context(self) -> tuple[list, list]:
        return self._objective.weights(), self._objective.state()

    def _sums(self, inputs: list, context: tuple[list, list]) -> Any:
        return ops.cast(ops.sum(self._values(inputs, context), axis=0), backend.widest_float())

    def _values(self, inputs: list, context: tuple[list, list]) -> Any:
        return self._values_and_slopes(inputs, context)[0]

    def _values_and_slopes(
        self, inputs: list, context: tuple[list, list]
    ) -> tuple[Any, Callable | None]:
        """Return the logits of classes and the function that gives their probabilities' slopes.

        The slope of a probability near 1 is lost in float32, the slope of its logit is not. If
        the logits are not known, return the outputs, `[B, K]`, and `None`.
        """
        x = keras.tree.pack_sequence_as(self._structure, inputs)
        with self._lock, self._objective.at(*context, False) as (predict, _):
            outputs, logits = predict_with_logits(self._model, predict, x)
        loss, kind = kind_of_loss(self._loss_bearer, outputs)
        values, slopes = keras.tree.flatten(outputs), None
        if kind:
            from_logits = getattr(loss, "from_logits", False)
            logits = values[0] if from_logits else logits.of(values[0], kind)
        if kind == "categorical" and logits is not None and len(logits.shape) > 2:
            values = [ops.softmax(logits)]  # of each position, one position beside the other
        elif kind and logits is not None:
            values, slopes = [logits], _SLOPES[kind]
        flat = [ops.reshape(v, (ops.shape(v)[0], -1)) for v in values]
        return ops.concatenate(flat, axis=1), slopes


def _slopes_of_softmax(logits: np.ndarray) -> np.ndarray:
    """Return diag p - p p^T of each example."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    slopes = -p[:, :, None] * p[:, None, :]
    diagonal = np.einsum("bkk->bk", slopes)
    diagonal[...] = 0
    diagonal[...] = -slopes.sum(axis=2)  # not p - p^2, where p is 1
    return slopes


def _slopes_of_sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return p (1 - p) of each example."""
    return np.exp(-np.logaddexp(0, logits) - np.logaddexp(0, -logits))[:, :, None]


_SLOPES = {"categorical": _slopes_of_softmax, "binary": _slopes_of_sigmoid}
