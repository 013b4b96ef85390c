"""The loss of a model over data, and its derivatives, as functions of the weights."""

import concurrent.futures
import functools
import math
import threading

import keras
import numpy as np
from keras import ops

from keras_infomcr import backend
from keras_infomcr.flatness.loss.compiled_loss import build_compiled_loss, compiled_loss
from keras_infomcr.flatness.loss.example_values import kind_of_loss
from keras_infomcr.flatness.loss.logits import predict_with_logits
from keras_infomcr.flatness.running.checks import MisfitWarning, check_built, check_compiled, warn
from keras_infomcr.flatness.running.shared import end_of_checks
from keras_infomcr.labels import check_labels, is_sparse
from keras_infomcr.objective import HALF_PRECISION, Objective, is_mean_over_examples, losses_of


class LossFunction:
    """The mean loss over the examples of data, without weight penalties.

    Weights are vectors `[W]`: the trainable variables one after the other. Nothing here changes
    the model.

    Args:
        model: A compiled and built `keras.Model`.
        training: Boolean, as for the model's `call`.

    Raises:
        TypeError: If the model is no `keras.Model`.
        ValueError: If it is not compiled, not built or has no trainable weights, or if its loss
            is no mean over the examples.
    """

    def __init__(self, model, training=False):
        check_compiled(model)
        check_built(model)
        if not is_mean_over_examples(model):
            raise ValueError(
                "The compiled loss must be a mean over the examples of a batch, with the "
                f'reduction "sum_over_batch_size". Received: loss={model.loss!r}'
            )
        self.model = model
        self._training = training
        self._objective = Objective(model)
        self._shapes = [tuple(v.shape) for v in model.trainable_variables]
        wide = any(v.dtype == "float64" for v in model.trainable_variables)
        self.dtype = np.dtype("float64" if wide else "float32")
        self._lock = threading.Lock()
        self._checks_labels = any(is_sparse(loss) for loss in losses_of(model))
        self._outputs_of_batch = self.compiled(self._predict)
        self._outputs = getattr(model, "outputs", None)
        self._clipped = []
        self._warned = False
        self._misfit_warning = MisfitWarning()
        self._loss = self.compiled(self._loss_of_batch)
        self._loss_and_guess = self.compiled(self._loss_and_guess_of_batch)
        self._gradient = self.compiled(backend.value_and_grad(self._with_nothing_else))
        self._products = backend.hessian_vector_products(
            self._loss_of_batch, compiled=not model.run_eagerly
        )

    def compiled(self, function):
        """Return the function, compiled unless the model asks to run eagerly."""
        return function if self.model.run_eagerly else backend.compiled(function)

    @property
    def size(self):
        """The number of trainable weights, W."""
        return sum(map(math.prod, self._shapes))

    def weights(self):
        """Return the model's weights as they are."""
        return self.vector([ops.copy(v) for v in self.model.trainable_variables])

    def state(self):
        """Return the model's other variables as they are, a list of arrays."""
        return self._objective.state()

    def vector(self, arrays):
        """Return a vector of arrays like the weights, `None` counting as zeros."""
        vector = np.zeros(self.size, self.dtype)
        for part, array in zip(self._parts(vector), arrays):
            if array is not None:
                part[...] = ops.convert_to_numpy(array)
        return vector

    def arrays(self, vector):
        """Return a vector as a list of the framework's arrays like the weights."""
        variables = self.model.trainable_variables
        parts = zip(self._parts(vector), variables)
        return [ops.convert_to_tensor(part, dtype=v.dtype) for part, v in parts]

    def _parts(self, vector):
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])[:-1]
        return [p.reshape(s) for p, s in zip(np.split(vector, ends), self._shapes)]

    def at(self, weights=None):
        """Return what the derivatives are taken at: a vector, or the model's weights as they are.

        Returns:
            Tuple of the lists of arrays of the weights and of the model's other variables.
        """
        return self.arrays(self.weights() if weights is None else weights), self.state()

    def loss(self, data, at):
        """Return the loss, a float."""
        return float(self.mean(self._loss, data, at)[0])

    def warn_of_misfit(self, data, at):
        """Warn, once until it fits, if the model does not fit the data."""
        loss, guess = self.mean(self._loss_and_guess, data, at)
        self._misfit_warning(float(loss), math.inf if guess is None else float(guess))

    def gradient(self, data, at):
        """Return the loss, a float, and its gradient, a vector."""

        def gradient(weights, state, x, y):
            (loss, _), gradients = self._gradient(weights, state, x, y)
            return loss, *gradients

        loss, *gradients = self.mean(gradient, data, at)
        return float(loss), self.vector(gradients)

    def hessian_vector_products(self, data, at, vectors):
        """Return the Hessian of the loss times each of some vectors, arrays `[k, W]`."""
        stacks = zip(*(self._parts(np.asarray(v, self.dtype)) for v in vectors))
        variables = self.model.trainable_variables
        stacks = [ops.convert_to_tensor(np.stack(s), v.dtype) for s, v in zip(stacks, variables)]

        def products(weights, state, stacks, x, y):
            return self._products(weights, stacks, state, x, y)

        found = self.mean(products, data, (*at, stacks))
        columns = [
            np.zeros((len(vectors), math.prod(shape)), self.dtype) if p is None else p
            for p, shape in zip(found, self._shapes)
        ]
        return np.concatenate([c.reshape(len(vectors), -1) for c in columns], axis=1)

    def mean(self, function, data, args):
        """Return the mean of a function over the examples of data, batch by batch.

        Args:
            function: Function `(*args, x, y)` of a batch that returns an array or a sequence of
                arrays and `None`: means over its examples.
            data: Iterable of batches `(x, y)` of NumPy arrays, read once.
            args: Tuple of structures of arrays, the first two those that `at` returns.

        Returns:
            List of NumPy arrays and `None`.

        Raises:
            ValueError: If a label stands for no class.
        """
        end_of_checks()
        batches, lock = iter(data), threading.Lock()

        def share(device):
            sums, count = None, 0
            while True:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return sums, count
                size = len(keras.tree.flatten(batch)[0])
                with lock:
                    self._prepare(batch, args)
                batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
                found = backend.on_device(device, function, *args, *batch)
                found = found if isinstance(found, (list, tuple)) else [found]
                if not count:
                    self._check_probabilities(batch, args)
                terms = [None if array is None else size * _widened(array) for array in found]
                sums = terms if sums is None else _added(sums, terms)
                count += size

        devices = backend.devices(self.model)
        if len(devices) == 1:
            shares = [share(devices[0])]
        else:
            with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
                shares = list(pool.map(share, devices))
        total = sum(count for _, count in shares)
        shares = [[_to_numpy(array) for array in sums] for sums, _ in shares if sums is not None]
        return [
            None if array is None else array / total for array in functools.reduce(_added, shares)
        ]

    def evaluate(self, weights, state, x, y):
        """Return the loss of a batch and the outputs, of the framework."""
        training = self._training
        with self._lock, self._objective.at(weights, state, training) as (predict, _):
            outputs, logits = predict_with_logits(self.model, predict, x)
            loss, clipped = compiled_loss(self.model, x, y, outputs, logits, training)
        known = list(enumerate(keras.tree.flatten(outputs)))
        self._clipped = [(k, kind) for p, kind in clipped for k, output in known if output is p]
        return loss, outputs

    def _predict(self, weights, state, x):
        with self._lock, self._objective.at(weights, state, self._training) as (predict, _):
            return predict(x)

    def _prepare(self, batch, args):
        """Check the labels of a batch and build the compiled loss, where that needs be."""
        x, y = batch
        built = self.model._compile_loss.built
        if not built or (self._checks_labels and self._outputs is None):
            x = keras.tree.map_structure(ops.convert_to_tensor, x)
            outputs = self._outputs_of_batch(*args[:2], x)
            build_compiled_loss(self.model, y, outputs)
            self._outputs = self._outputs or keras.tree.map_structure(
                lambda a: keras.KerasTensor(a.shape, a.dtype), outputs
            )
        if self._checks_labels:
            check_labels(self.model, y, self._outputs)

    def _check_probabilities(self, batch, args):
        """Warn once of probabilities that Keras clips, whose loss then has no derivatives."""
        if self._warned or not self._clipped:
            return
        outputs = keras.tree.flatten(self._outputs_of_batch(*args[:2], batch[0]))
        arrays = [(ops.convert_to_numpy(outputs[k]), kind) for k, kind in self._clipped]
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

    def _loss_of_batch(self, *args):
        return self.evaluate(*args)[0]

    def _loss_and_guess_of_batch(self, weights, state, x, y):
        """Return the cross-entropy and that of a uniform guess, `None` for any other loss."""
        loss, outputs = self.evaluate(weights, state, x, y)
        compiled, kind = kind_of_loss(self.model, outputs)
        # A `compute_loss` of the user's may take other labels.
        if kind is None or type(self.model).compute_loss is not keras.Model.compute_loss:
            return loss, None
        y, outputs = (keras.tree.flatten(a)[0] for a in (y, outputs))
        num_classes = outputs.shape[-1]
        if kind == "binary":
            y, num_classes = ops.reshape(y, ops.shape(outputs)), 2
        loss = ops.mean(compiled(y, outputs))
        return loss, ops.full_like(loss, math.log(num_classes))

    def _with_nothing_else(self, *args):
        return self._loss_of_batch(*args), ()


def _widened(array):
    half = keras.backend.standardize_dtype(array.dtype) in HALF_PRECISION
    return ops.cast(array, "float32") if half else array


def _added(sums, terms):
    return [b if a is None else a if b is None else a + b for a, b in zip(sums, terms)]


def _to_numpy(array):
    return None if array is None else ops.convert_to_numpy(array)
