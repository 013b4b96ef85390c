"""Algorithm 1 of the paper, read literally and slowly, as a `keras.Model`.

"Information-Theoretic Local Minima Characterization and Regularization" (Jia & Su, ICML 2020)
writes the update in Algorithm 1 as a loop over the sub-batches of a batch. `Literal` follows that
loop in plain Keras: it moves the weights in place, evaluates the loss there, and moves them back.
It shares no code with the package.

`check_training` trains two models from the same seed, in float64: a `RegularizedModel`, and one
that is plain Keras with beta = 0, be it a `keras.Model` or a `Literal`.

* With beta = 0, they must agree to the bit in weights, state, optimizer, metrics and logs.
* With beta > 0, they must agree to rounding. Float64 rounds one update by some 1e-15 and
  the regulariser's part of the update is of order 1e-3. The tolerance of 1e-9 of that part is a
  thousand times what one step rounds, which leaves room for four steps.
"""

import keras
import numpy as np
from frameworks import (
    BACKEND,
    apply,
    generator_states,
    gradients,
    numpy,
    restore_generators,
    slices,
    stateful_step,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

ALPHA, BETA = 0.05, 2.0


def literal_base(num_sub_batches=2):
    """Return a class to use in the place of `keras.Model`.

    Each call makes a new class, because Keras rewrites the bases of the class that makes a
    Functional model.
    """

    class Literal(keras.Model):
        beta = 0.0

        def train_step(self, *args):
            if not self.beta:
                return super().train_step(*args)
            return stateful_step(self, self.literal_step, *args)

        def literal_step(self, data):
            """Take one step of Algorithm 1; return the logs."""
            data = keras.tree.map_structure(to_tensor, data)
            x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
            untouched = copy_of(weights)
            y_pred, loss, found = self.evaluate_at(x, y, weights, penalties=True)
            self._loss_tracker.update_state(loss, sample_weight=batch_size(x))
            # What the main pass has left is what the step leaves: the evaluations of the
            # sub-batches must not advance metrics, statistics or random numbers.
            after = values_of(self.variables + self.metrics_variables)
            generators = generator_states()
            total = self.regularizer(x, y, untouched)
            restore(after)
            restore_generators(generators)
            scale = self.optimizer.scale_loss(1.0)
            found = [
                None if g is None else scale * (g + self.beta * r) for g, r in zip(found, total)
            ]
            apply(self.optimizer, found, self.trainable_variables)
            return self.compute_metrics(x, y, y_pred, sample_weight=weights)

        def evaluate_at(self, x, y, weights, penalties=False):
            """Return the predictions, the loss and its gradients at the weights of now.

            Args:
                x: Inputs.
                y: Labels.
                weights: Sample weights, or `None`.
                penalties: Boolean, whether weight penalties count.
            """
            kwargs = {"training": True} if self._call_has_training_arg else {}
            own_weights = weights if penalties else copy_of(weights)

            def loss():
                y_pred = self(x, **kwargs)
                loss = self._compute_loss(x, y, y_pred, own_weights, training=True)
                if not penalties:
                    loss -= sum(v.regularizer(v) for v in self.trainable_variables if v.regularizer)
                return loss, y_pred

            loss, y_pred, found = gradients(loss, self.trainable_variables)
            return y_pred, loss, found

        def regularizer(self, x, y, weights):
            """Return the gradient of R_alpha; append its value and the batch size to `values`."""
            variables = self.trainable_variables
            total, size, value = [0.0 for _ in variables], batch_size(x), 0.0
            for rows in slices(size, num_sub_batches):
                part = take(x, rows), take(y, rows), take(weights, rows)
                state = values_of(self.non_trainable_variables)
                generators = generator_states()
                _, loss, g = self.evaluate_at(*part)
                # The next sub-batch goes on with the random numbers that this one leaves, while
                # its second evaluation draws the same ones as its first.
                seeds = [(v, v.numpy()) for v, _ in state if "float" not in v.dtype]
                restore(state)
                restore_generators(generators)
                here = values_of(variables)
                for v, d in zip(variables, g):
                    if d is not None:
                        v.assign(v - ALPHA * d)
                _, loss_moved, h = self.evaluate_at(*part)
                restore(here + state + seeds)
                fraction = len(rows) / size
                value += fraction * float(loss - loss_moved)
                total = [t if a is None else t + fraction * (a - b) for t, a, b in zip(total, g, h)]
            self.values.append((value, size))
            return total

    return Literal


def values_of(variables):
    """Return pairs of a variable and its value."""
    return [(v, v.numpy()) for v in variables]


def restore(values):
    """Assign what `values_of` returned."""
    for variable, value in values:
        variable.assign(value)


def to_tensor(array):
    """Return an array of the framework; sparse and ragged ones are left as they are."""
    whole = array is None or type(array).__name__ in ("SparseTensor", "RaggedTensor", "BCOO")
    return array if whole else keras.ops.convert_to_tensor(array)


def copy_of(weights):
    """Return a copy of sample weights, which Keras's losses change in place on torch."""
    return keras.tree.map_structure(lambda a: None if a is None else keras.ops.copy(a), weights)


def batch_size(x):
    """Return the number of examples."""
    first = keras.tree.flatten(x)[0]
    return int(first.shape[0] if first.shape[0] is not None else first.nrows())


def take(structure, rows):
    """Return the rows of all arrays of a structure, each of the kind that it was."""

    def of(array):
        if array is None:
            return None
        if type(array).__name__ in ("SparseTensor", "RaggedTensor"):
            import tensorflow as tf

            if isinstance(array, tf.RaggedTensor):
                return tf.gather(array, rows)
            return tf.sparse.from_dense(tf.gather(tf.sparse.to_dense(array), rows))
        dense = keras.ops.take(keras.ops.convert_to_tensor(array, sparse=False), rows, axis=0)
        return type(array).fromdense(dense) if type(array).__name__ == "BCOO" else dense

    return keras.tree.map_structure(of, structure)


def trained(base, build, fit, compile, **kwargs):
    """Return a model of a fixed seed, trained, with its logs."""
    keras.utils.set_random_seed(0)
    model = build(base)
    model.compile(**compile(), **kwargs)
    return model, fit(model)


def run_as_python(model):
    """Let each step of a model that has been compiled, and maybe trained, run as Python."""
    model.run_eagerly, model.jit_compile, model.steps_per_execution = True, False, 1
    model.train_function = None


def everything(model):
    """Return the variables that training changes, those of metrics among them."""
    of_metrics = [v for metric in model.metrics for v in metric.variables]
    return [*model.variables, *model.optimizer.variables, *of_metrics]


def variables(model):
    """Return NumPy arrays of all that training changes."""
    return [numpy(v) for v in everything(model)]


def flat(arrays):
    """Return the numbers of all arrays in one vector of float64."""
    return np.concatenate([np.ravel(a) for a in arrays]).astype("float64")


def weights_of(model):
    """Return all weights in one vector."""
    return flat(map(numpy, model.weights))


def assert_same(ours, plain, tolerance=0.0):
    """Compare lists of arrays or logs: to the bit, or within a tolerance relative to their norm."""
    if isinstance(ours, dict):
        assert list(ours) == list(plain)
        ours, plain = list(ours.values()), list(plain.values())
    assert [np.shape(a) for a in ours] == [np.shape(a) for a in plain]
    ours, plain = flat(ours), flat(plain)
    if tolerance:
        assert np.linalg.norm(ours - plain) <= tolerance * np.linalg.norm(plain)
    else:
        np.testing.assert_array_equal(ours, plain)


def check_training(build, fit, compile, main="full_batch", tolerance=0.0, literal=True, count=2):
    """Assert that training with beta = 0 is plain Keras and that beta > 0 is Algorithm 1.

    Args:
        build: Function of a base class that returns a model.
        fit: Function of the model that trains it and returns its logs, a dictionary.
        compile: Function that returns the arguments of `compile`.
        main: The `main_gradient`. Only `"full_batch"` can agree with plain Keras to the bit.
        tolerance: Float, relative, for beta = 0.
        literal: Boolean, whether to train with beta > 0 as well and compare with `Literal`.
        count: Integer, the number M of sub-batches.

    Returns:
        The `RegularizedModel`.
    """
    if main != "full_batch" or BACKEND == "jax":  # XLA fuses the two programs differently
        tolerance = tolerance or 1e-13
    regularizer = SubBatchPerturbation(ALPHA, 0.0, count, main)
    ours, logs = trained(RegularizedModel, build, fit, compile, regularizer=regularizer)
    base = literal_base(count) if literal else keras.Model
    plain, plain_logs = trained(base, build, fit, compile)
    value = logs.pop("infomcr_reg", None)
    assert value is None or np.isfinite(value).all() or not literal
    assert_same(variables(ours), variables(plain), tolerance)
    assert_same(logs, plain_logs, tolerance)
    if literal:
        check_algorithm_1(ours, plain, fit)
    return ours


def check_algorithm_1(ours, slow, fit):
    """Assert that models which agree so far train on as Algorithm 1 does.

    The second trains on without it first, to tell the effect of the regulariser.
    """

    def train(model):
        keras.utils.set_random_seed(1)
        return fit(model)

    before = values_of(everything(slow))
    train(slow)
    plain = weights_of(slow)
    restore(before)
    run_as_python(slow)
    slow.beta, slow.values = BETA, []
    ours.regularizer.beta = BETA
    logs, slow_logs = train(ours), train(slow)
    got = logs.pop("infomcr_reg", None)
    if got is not None:
        values, sizes = np.transpose(slow.values)
        np.testing.assert_allclose(got, [np.average(values, weights=sizes)], rtol=1e-9)
    # Keras weights the losses of single outputs by the batch size, but only where it is eager.
    of_outputs = [key for key in logs if key.endswith(("a_loss", "b_loss"))]
    assert_same(*({k: a[k] for k in a if k not in of_outputs} for a in (logs, slow_logs)), 1e-9)
    effect = np.linalg.norm(weights_of(slow) - plain)
    assert effect > 1e-6, "the regulariser changed nothing: there is nothing to compare"
    assert np.linalg.norm(weights_of(ours) - weights_of(slow)) <= 1e-9 * effect
