"""The results that a step and the measures should give, by eager plain Keras in float64."""

import keras
import numpy as np
from frameworks import generator_states, gradients, numpy, restore_generators, slices

LEARNING_RATE = 1 / 8


def rows_of(data, rows):
    """Return some examples of `(x, y, sample_weight)` as arrays of the framework."""
    return keras.tree.map_structure(
        lambda a: None if a is None else keras.ops.convert_to_tensor(a[rows]), data
    )


def flat(arrays):
    return np.concatenate([np.zeros(0), *(np.ravel(a) for a in arrays)]).astype("float64")


class Reading:
    """A slow reading of Algorithm 1 on a plain model, whose weights it moves in place.

    Args:
        model: A compiled `keras.Model`.
        alpha: Float.
        beta: Float.
        num_sub_batches: Integer, M.
        main_gradient: `"full_batch"` or `"sub_batches"`.
        estimator: As for `SubBatchPerturbation`; products by central differences of gradients.
        training: Boolean, as for the model's `call`.
    """

    def __init__(
        self,
        model,
        alpha=0.0,
        beta=0.0,
        num_sub_batches=1,
        main_gradient="full_batch",
        estimator="finite_difference",
        training=True,
    ):
        self.model = model
        self.training = training
        self.variables = model.trainable_variables
        self.alpha, self.beta = alpha, beta
        self.count, self.main = num_sub_batches, main_gradient
        self.products = estimator == "hessian_vector_product"
        self.error = 0.0  # of the central differences

    def step(self, batch, chosen=None):
        """Take a step of gradient descent; return the regulariser's value and the two gradients."""
        size = len(keras.tree.flatten(batch)[0])
        parts = slices(size, self.count)
        chosen = range(len(parts)) if chosen is None else chosen
        of_main = self.main == "sub_batches"
        if of_main:
            main = self.penalty_gradients()
        else:
            main = flat(self.evaluate(batch, penalties=True)[1])
        before, value, extra, left = self.state(), 0.0, 0.0, []
        for i, rows in enumerate(parts):
            if i not in chosen and not of_main:
                continue
            fraction = len(rows) / size
            loss, g = self.evaluate(rows_of(batch, rows))
            left.append((fraction, self.state()))
            if i in chosen:
                self.set_floats(before)
                seeds = self.state()
                self.set_seeds(left[-2][1] if len(left) > 1 else before)
                one, two = self.difference(rows_of(batch, rows), loss, g)
                self.set_seeds(seeds)
                value += fraction * len(parts) / len(chosen) * one
                extra += fraction * len(parts) / len(chosen) * two
            self.set_floats(before)
            if of_main:
                main = main + fraction * flat(g)
        if of_main:
            self.set_floats(mean_of_states(left))
            self.set_seeds(left[0][1])
        else:
            self.set_floats(before)
            self.set_seeds(before)
        self.move(-LEARNING_RATE * (main + self.beta * extra))
        return value, main, extra

    def difference(self, batch, loss, g):
        """Return the terms of one sub-batch, whose evaluation at w has left its state."""
        g = flat(g)
        if not self.products:
            moved_loss, h = self.at(-self.alpha * g, batch)
            return loss - moved_loss, g - h
        product, error = self.product(g, batch)
        self.error = max(self.error, self.alpha * error)
        return self.alpha * np.sum(g**2), self.alpha * product

    def product(self, vector, batch):
        """Return H v by extrapolated central differences, and by how much two steps differ."""
        length = np.linalg.norm(vector)
        if not length > 0:
            return np.zeros_like(vector), 0.0

        def by(step):
            shift = step * vector / length
            rise = self.at(shift, batch)[1] - self.at(-shift, batch)[1]
            return length * rise / (2 * step)

        coarse, fine = by(2e-4), by(1e-4)
        return (4 * fine - coarse) / 3, np.linalg.norm(fine - coarse)

    def at(self, shift, batch):
        """Return the loss and gradient at shifted weights; all is left as it was."""
        before = self.everything()
        self.move(shift)
        loss, gradient = self.evaluate(batch)
        self.set_everything(before)
        return loss, flat(gradient)

    def evaluate(self, batch, penalties=False):
        """Return the loss and the arrays of its gradients; the layers advance their states."""
        x, y, weights = keras.tree.map_structure(
            lambda a: None if a is None else keras.ops.copy(a), rows_of(batch, slice(None))
        )

        def loss():
            outputs = self.model(x, training=self.training)
            value = self.model.compute_loss(x, y, outputs, weights, training=self.training)
            if not penalties:
                value = value - self.penalty()
            return keras.ops.cast(value, "float64"), ()

        value, _, found = gradients(loss, self.variables)
        return float(numpy(value)), self.filled(found)

    def penalty(self):
        return sum([v.regularizer(v) for v in self.variables if v.regularizer], 0.0)

    def penalty_gradients(self):
        if not any(v.regularizer for v in self.variables):
            return flat(self.filled([None for _ in self.variables]))
        return flat(self.filled(gradients(lambda: (self.penalty(), ()), self.variables)[2]))

    def filled(self, found):
        return [
            np.zeros(v.shape) if g is None else numpy(keras.ops.convert_to_tensor(g))
            for g, v in zip(found, self.variables)
        ]

    def move(self, shift):
        start = 0
        for variable in self.variables:
            end = start + int(np.prod(variable.shape))
            variable.assign(variable.numpy() + shift[start:end].reshape(variable.shape))
            start = end

    def everything(self):
        return [v.numpy() for v in self.variables], self.state()

    def set_everything(self, everything):
        weights, state = everything
        for variable, value in zip(self.variables, weights):
            variable.assign(value)
        self.set_floats(state)
        self.set_seeds(state)

    def state(self):
        return [v.numpy() for v in self.model.non_trainable_variables], generator_states()

    def set_floats(self, state):
        for variable, value in zip(self.model.non_trainable_variables, state[0]):
            if "float" in variable.dtype:
                variable.assign(value)

    def set_seeds(self, state):
        for variable, value in zip(self.model.non_trainable_variables, state[0]):
            if "float" not in variable.dtype:
                variable.assign(value)
        restore_generators(state[1])


def mean_of_states(left):
    total = sum(fraction for fraction, _ in left)
    means = [
        sum(f * np.asarray(values[k], "float64") for f, (values, _) in left) / total
        for k in range(len(left[0][1][0]))
    ]
    return means, None
