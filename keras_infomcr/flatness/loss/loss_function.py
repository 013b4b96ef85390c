"""The loss of a model over data, and its derivatives, as functions of the weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.batch_loss import batch_loss
from keras_infomcr.flatness.loss.compiled_loss import build_compiled_loss
from keras_infomcr.flatness.loss.means import mean_over_examples
from keras_infomcr.flatness.loss.measured_loss import resolved_loss
from keras_infomcr.flatness.running.checks import check_built, misfit_warning, warn
from keras_infomcr.flatness.running.only_checking import end_of_checks
from keras_infomcr.keras_internals import compile_loss
from keras_infomcr.labels import check_labels, is_sparse
from keras_infomcr.objective import is_mean_over_examples, losses_of

# So many examples tell whether the model fits its data at all.
_EXAMPLES_THAT_TELL = 100


class LossFunction:
    """The mean loss over the examples of data, without weight penalties, for one measurement.

    Weights are vectors `[W]`: the trainable variables, in the order of `model.trainable_variables`,
    each flattened row by row. Nothing here changes the model. What is compiled for it is kept as
    long as the model lives (`batch_loss`); warnings that come once come once for a measurement.

    Args:
        model: A built `keras.Model`, compiled unless `loss` is given.
        training: Boolean, as for the model's `call`.
        loss: As for `hessian_trace`.

    Raises:
        TypeError: If the model is no `keras.Model`.
        ValueError: If it has no loss, is not built or has no trainable weights, or if its loss is
            no mean over the examples.
    """

    def __init__(self, model: keras.Model, training: bool = False, loss: Any = None):
        self.bearer = resolved_loss(model, loss)
        check_built(model)
        if not is_mean_over_examples(self.bearer):
            raise ValueError(
                "The loss must be a mean over the examples of a batch, with the reduction "
                f'"sum_over_batch_size". Received: loss={self.bearer.loss!r}. Set its reduction, '
                "or pass `loss=...` to the measure."
            )
        self.model = model
        self.batch = batch_loss(model, self.bearer, training)
        self._shapes = [tuple(v.shape) for v in model.trainable_variables]
        wide = any(v.dtype == "float64" for v in model.trainable_variables)
        self.dtype = np.dtype("float64" if wide else "float32")
        self._checks_labels = any(is_sparse(loss) for loss in losses_of(self.bearer))
        self._outputs = getattr(model, "outputs", None)
        self._warned = False
        self._misfit_warning = misfit_warning()

    @property
    def size(self) -> int:
        """The number of trainable weights, W."""
        return sum(map(math.prod, self._shapes))

    def weights(self) -> np.ndarray:
        """Return the model's weights as they are."""
        return self.vector([ops.copy(v) for v in self.model.trainable_variables])

    def state(self) -> list:
        """Return the model's other variables as they are, a list of arrays."""
        return self.batch.objective.state()

    def vector(self, arrays: list) -> np.ndarray:
        """Return a vector of arrays like the weights, `None` counting as zeros."""
        vector = np.zeros(self.size, self.dtype)
        for part, array in zip(self._parts(vector), arrays):
            if array is not None:
                part[...] = ops.convert_to_numpy(array)
        return vector

    def arrays(self, vector: np.ndarray) -> list:
        """Return a vector as a list of the framework's arrays like the weights."""
        variables = self.model.trainable_variables
        parts = zip(self._parts(vector), variables)
        return [ops.convert_to_tensor(part, dtype=v.dtype) for part, v in parts]

    def _parts(self, vector: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])[:-1]
        return [p.reshape(s) for p, s in zip(np.split(vector, ends), self._shapes)]

    def point(self, weights: np.ndarray | None = None) -> tuple[list, list]:
        """Return where to evaluate: at a vector, or at the model's weights as they are.

        Returns:
            Tuple of the lists of arrays of the weights and of the model's other variables.
        """
        return self.arrays(self.weights() if weights is None else weights), self.state()

    def loss(self, data: Iterable, at: tuple) -> float:
        """Return the loss, a float."""
        return float(self.mean(self.batch.loss, data, at)[0])

    def warn_of_misfit(self, data: Iterable):
        """Warn, once until it fits, if the model as it is does not fit the first of the data."""
        means = self.mean(self.batch.loss_and_guess, _first_batches(data), self.point())
        loss, guess = (None if mean is None else float(mean) for mean in means)
        # No guess is known to compare other losses than cross-entropies with.
        self._misfit_warning(loss, math.inf if guess is None else guess)

    def gradient(self, data: Iterable, at: tuple) -> tuple[float, np.ndarray]:
        """Return the loss, a float, and its gradient, a vector."""

        def gradient(weights, state, x, y):
            (loss, _), gradients = self.batch.gradient(weights, state, x, y)
            return loss, *gradients

        loss, *gradients = self.mean(gradient, data, at)
        return float(loss), self.vector(gradients)

    def hessian_vector_products(self, data: Iterable, at: tuple, vectors: np.ndarray) -> np.ndarray:
        """Return the Hessian of the loss times each of some vectors, arrays `[k, W]`."""
        stacks = zip(*(self._parts(np.asarray(v, self.dtype)) for v in vectors))
        variables = self.model.trainable_variables
        stacks = [ops.convert_to_tensor(np.stack(s), v.dtype) for s, v in zip(stacks, variables)]

        found = self.mean(self.batch.hessian_vector_products, data, (*at, stacks))
        columns = [
            np.zeros((len(vectors), math.prod(shape)), self.dtype) if p is None else p
            for p, shape in zip(found, self._shapes)
        ]
        return np.concatenate([c.reshape(len(vectors), -1) for c in columns], axis=1)

    def mean(self, function: Callable, data: Iterable, args: tuple) -> list[np.ndarray | None]:
        """Return the mean of a function over the examples of data, as `mean_over_examples` does.

        Args:
            function: Function `(*args, x, y)` of a batch, which means over its examples.
            data: Iterable of batches `(x, y)` of NumPy arrays, read once.
            args: Tuple of structures of arrays, the first two what `point` returns.

        Raises:
            ValueError: If a label stands for no class.
        """
        end_of_checks()
        devices = backend.devices(self.model)
        checks = self._prepare, self._check_probabilities
        return mean_over_examples(function, data, args, devices, *checks)

    def _prepare(self, batch: tuple, args: tuple):
        """Check the labels of a batch, and let Keras choose its functions before it is traced."""
        x, y = batch
        built = compile_loss(self.bearer).built
        if not built or (self._checks_labels and self._outputs is None):
            x = keras.tree.map_structure(ops.convert_to_tensor, x)
            outputs = self.batch.outputs(*args[:2], x)
            self._outputs = self._outputs or keras.tree.map_structure(
                lambda a: keras.KerasTensor(a.shape, a.dtype), outputs
            )
        if self._checks_labels:
            check_labels(self.bearer, y, self._outputs)
        if not built:
            build_compiled_loss(self.bearer, y, outputs)

    def _check_probabilities(self, batch: tuple, args: tuple):
        """Warn once of probabilities that Keras clips, whose loss then has no derivatives."""
        if self._warned or not self.batch.clipped:
            return
        outputs = keras.tree.flatten(self.batch.outputs(*args[:2], batch[0]))
        arrays = [(ops.convert_to_numpy(outputs[k]), kind) for k, kind in self.batch.clipped]
        epsilon = keras.config.epsilon()
        if any(
            p.max() > 1 - epsilon or (kind == "binary" and p.min() < epsilon) for p, kind in arrays
        ):
            self._warned = True
            warn(
                f"Some of the model's probabilities are nearer to 0 or 1 than {epsilon}, where "
                "Keras clips them and the loss has no derivatives. The model does not end in a "
                "softmax or sigmoid that Keras can look behind. Let it return logits and compile "
                "it with a loss with `from_logits=True`."
            )


def _first_batches(data: Iterable) -> Iterator[tuple]:
    """Yield as many batches as hold the examples that tell whether the model fits."""
    count = 0
    for batch in data:
        yield batch
        count += len(keras.tree.flatten(batch)[0])
        if count >= _EXAMPLES_THAT_TELL:
            return
