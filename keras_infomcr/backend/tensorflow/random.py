"""TensorFlow: random numbers, and the refusal of numbers that cannot be drawn again."""

import contextlib
import re
import weakref
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_infomcr import keras_internals
from keras_infomcr.core.host_generators import host_generators_kept

# Operations that draw from hidden states of TensorFlow; Keras's own random layers use none.
_DRAW = re.compile(
    "Random(?!Dataset)|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|"
    "SampleDistortedBoundingBox|NonDeterministicInts|RngReadAndSkip|RngSkip|"
    "Stateful(Uniform|StandardNormal|TruncatedNormal|RandomBinomial)"
)

_checked = weakref.WeakSet()


class _Draws(ValueError):
    """Raised for a draw, to be told from the errors of models that cannot be traced."""


def random_state() -> list[tf.Tensor]:
    """Return nothing: what TensorFlow's unseeded operations draw from cannot be read."""
    return []


def set_random_state(state: list[tf.Tensor]) -> None:
    """Do nothing."""


@contextlib.contextmanager
def draws_refused() -> Iterator[None]:
    """Raise an error if what is traced in this context draws random numbers by TensorFlow itself.

    Two evaluations would draw different numbers. Nothing is traced where a model runs eagerly: see
    `check_draws_of_eager_model`.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    start = len(graph.get_operations())
    yield
    draws = _draws(graph, graph.get_operations()[start:])
    if draws:
        raise _Draws(
            "Layers must draw random numbers by `keras.random`, with a `seed` that is a "
            "`keras.random.SeedGenerator` made in their constructor: two evaluations of the loss "
            "must see the same numbers. Received: layers that draw by operations of TensorFlow, "
            f"{draws}. Change these layers; as they are, the model can be trained with "
            "`compile(regularizer=None)`, and not be measured."
        )


def check_draws_of_eager_model(model: keras.Model, x) -> None:
    """Raise the error of `draws_refused` for a model that runs eagerly.

    The model is traced for this check alone, once in its life: an operation is seen in a graph.
    """
    if model in _checked or not model.built:
        return
    _checked.add(model)
    call = {"training": True} if keras_internals.call_has_training_arg(model) else {}

    @tf.function(autograph=False)
    def traced(x):
        with keras.StatelessScope(collect_losses=True), draws_refused():
            return model(x, **call)

    try:
        with host_generators_kept():
            traced.get_concrete_function(x)
    except _Draws:
        raise
    except Exception:  # a model that can only run eagerly
        return


def _draws(graph, operations):
    """Return the names of the operations that draw, by themselves or in functions they call."""
    found = [op.name for op in operations if _is_draw(op.type, op.op_def.is_stateful)]
    callers = {op.name: functions for op in operations if (functions := _functions(op))}
    if callers:  # only then: the definitions of all functions of the graph are made
        library = {f.signature.name: f for f in graph.as_graph_def().library.function}
        found += [name for name, called in callers.items() if _any_draws(called, library, set())]
    return found


def _any_draws(names, library, seen):
    for name in set(names) & library.keys() - seen:
        seen.add(name)
        nodes = library[name].node_def
        if any(_is_draw(node.op, True) for node in nodes):
            return True
        called = [f for node in nodes for a in node.attr.values() for f in _names(a)]
        if _any_draws(called, library, seen):
            return True
    return False


def _is_draw(kind, stateful):
    return stateful and bool(_DRAW.match(kind)) and not kind.endswith("Grad")


def _functions(operation):
    """Return the names of the functions that an operation calls."""
    attributes = [a for a in operation.op_def.attr if "func" in a.type]
    if not attributes:
        return []
    return [name for a in operation.node_def.attr.values() for name in _names(a)]


def _names(attribute):
    return [f.name for f in (attribute.func, *attribute.list.func) if f.name]
