"""JAX: the training step, which is a pure function of the state.

Keras hands the values of four lists of variables to a compiled step, which returns new ones. While
`fit` runs the variables themselves hold nothing. A variable in none of the lists would become a
constant of the compiled step: this is why ours are added to the last list, Keras's own place for
what is no weight, the metrics' variables.
"""

import contextlib
from collections.abc import Callable

import jax
import keras

from keras_infomcr import keras_internals
from keras_infomcr.backend.jax.control_flow import batch_size
from keras_infomcr.backend.trainer import BaseTrainer


class Trainer(BaseTrainer):
    """The trainer of JAX.

    Private attributes, assigned past Keras's tracking:
        _hidden_in_step: Variables of ours that the present step gets unseen, and their present
            values.
        _in_step: Boolean, whether a function that has all state as arguments runs.
    """

    _hidden_in_step = ([], [])
    _in_step = False

    @property
    def metrics_variables(self):
        # None in a step, which gets them unseen: see `_hiding_ours`.
        ours = [] if self._hidden_in_step[0] else self._variables_in_step()
        return [*super().metrics_variables, *ours]

    def make_train_function(self, force=False):
        before = self.train_function
        with self._step_hiding_ours("train_step"):
            super().make_train_function(force)
        if self.train_function is not before:
            self.train_function = self._keeping_state(self._as_step(self.train_function))
        return self.train_function

    def make_test_function(self, force=False):
        before = self.test_function
        with self._step_hiding_ours("test_step"):
            super().make_test_function(force)
        if self.test_function is not before:
            self.test_function = self._as_step(self.test_function)
        return self.test_function

    def make_predict_function(self, force=False):
        before = self.predict_function
        super().make_predict_function(force)
        if self.predict_function is not before:
            self.predict_function = self._as_step(self.predict_function)
        return self.predict_function

    def _sync_variables(self) -> None:
        # A step itself has what it needs, and must not be taken for synchronised.
        if not (self._in_step or keras_internals.in_stateless_scope()):
            self.jax_state_sync()

    def _call_step(self, step: Callable, state, data):
        lists, (ours, present) = self._state_variables(), self._hidden_in_step
        pairs = [pair for variables, values in zip(lists, state) for pair in zip(variables, values)]
        with keras.StatelessScope(state_mapping=[*pairs, *zip(ours, present)]) as scope:
            logs = step(data)
        present[:] = [scope.get_current_value(v) for v in ours]
        return logs, tuple([scope.get_current_value(v) for v in variables] for variables in lists)

    def _main_pass(self, x, y, sample_weight):
        state, metrics = self.non_trainable_variables, self.metrics_variables
        gradient = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (_, (loss, y_pred, *updates)), gradients = gradient(
            *(_values(v) for v in (self.trainable_variables, state, metrics)),
            x,
            y,
            sample_weight,
            training=True,
            optimizer_variables=_values(self.optimizer.variables),
        )
        for variables, values in zip((state, metrics), updates):
            _assign(variables, values)
        keras_internals.loss_tracker(self).update_state(loss, sample_weight=batch_size(x))
        return y_pred, gradients

    def _apply_gradients(self, gradients: list) -> None:
        # Not `optimizer.apply`, which a `LossScaleOptimizer` has for stateful backends alone.
        optimizer, variables = self.optimizer, self.trainable_variables
        values, state = optimizer.stateless_apply(
            _values(optimizer.variables), gradients, _values(variables)
        )
        _assign([*variables, *optimizer.variables], [*values, *state])

    def _state_variables(self):
        """Return the lists of variables that make Keras's state, in its order."""
        return (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )

    @contextlib.contextmanager
    def _step_hiding_ours(self, name: str):
        """Let the method of that name hide our variables while Keras compiles it."""
        own = self.__dict__.get(name)  # a step that a user has assigned to the model itself
        object.__setattr__(self, name, self._hiding_ours(getattr(self, name)))
        try:
            yield
        finally:
            object.__delattr__(self, name)
            if own is not None:
                object.__setattr__(self, name, own)

    def _hiding_ours(self, step):
        """Return a step that passes what the regulariser reads and assigns, unseen by a user's.

        A user's own step counts the metrics' variables. So ours stand behind these in the state,
        and are taken off before the user's step. JAX compiles equal functions once: this one is
        equal to no other, so that it shares nothing with one compiled for another regulariser.
        """

        def hiding(state, data):
            *lists, metrics = state
            ours = self._variables_in_step()
            count = len(metrics) - len(ours)
            values = metrics[count:]
            object.__setattr__(self, "_hidden_in_step", (ours, values))
            try:
                logs, (*lists, seen) = step((*lists, metrics[:count]), data)
            finally:
                object.__setattr__(self, "_hidden_in_step", ([], []))
            return logs, (*lists, [*seen, *metrics[len(seen) : count], *values])

        return hiding

    def _as_step(self, function):
        """Return the function, which has what it needs: `_sync_variables` does nothing in it."""

        def as_step(*args):
            object.__setattr__(self, "_in_step", True)
            try:
                return function(*args)
            finally:
                object.__setattr__(self, "_in_step", False)

        return as_step

    def _keeping_state(self, function):
        """Give the variables back the values that `fit` has taken from them, should a step fail."""

        def keeping_state(state, iterator):
            try:
                return function(state, iterator)
            except StopIteration:  # the end of the data
                raise
            except BaseException:
                for variables, values in zip(self._state_variables(), state):
                    for variable, value in zip(variables, values):
                        # A step that has begun owns the memory of what it was given.
                        if not value.is_deleted():
                            variable.assign(value)
                raise

        return keeping_state


def _values(variables):
    return [v.value for v in variables]


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)
