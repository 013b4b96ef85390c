"""The replicas of a model: how they are made, their mean and their distance to it."""

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_infomcr.keras_internals import without_compile_config
from keras_infomcr.models.overrides import overrides_of


def check_model(model: Any):
    """Refuse what no replicas can be made of."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r} (of type {type(model)})"
        )
    overridden = overrides_of(model)
    if overridden:
        raise ValueError(
            f"`model` must not override {', '.join(f'`{name}`' for name in overridden)}, which a "
            f"`ReplicatedModel` would not call. Received: model={model!r} (of type {type(model)}). "
            "Pass a plain `keras.Model`."
        )
    if not model.built or not model.trainable_variables:
        raise ValueError(
            "`model` must be built and have trainable weights. Received: "
            f"model={model!r}, built={model.built}. Call it on a batch first."
        )


def make_replica(model: keras.Model, number: int, same_start: bool) -> keras.Model:
    """Return a copy of a model that starts from weights of its own.

    Args:
        model: The model.
        number: Integer, the number of the replica. Replica 0 starts as the model, seeds included.
        same_start: Boolean, whether all replicas start from its weights.
    """
    try:
        with without_compile_config(model):
            replica = keras.models.clone_model(model)
    except Exception as error:
        raise _not_copied(model, "It raises the error above.") from error
    shapes = [[tuple(v.shape) for v in m.variables] for m in (replica, model)]
    if shapes[0] != shapes[1]:
        raise _not_copied(model, f"The copy's variables have the shapes {shapes[0]}.")
    names = "variables" if number == 0 else "weights" if same_start else "non_trainable_weights"
    for variable, value in zip(getattr(replica, names), getattr(model, names)):
        variable.assign(ops.copy(value))
    return replica


def _not_copied(model, reason):
    return ValueError(
        "`keras.models.clone_model(model)` must return a built copy of `model`. Received: "
        f"model={model!r} (of type {type(model)}). {reason} Give its class a `get_config` that "
        "returns the arguments of its constructor, and a `build` that makes its weights."
    )


def are_equal(replica: keras.Model, other: keras.Model) -> bool:
    """Return whether two replicas have the same trainable weights."""
    pairs = zip(replica.trainable_variables, other.trainable_variables)
    return not any(ops.any(ops.copy(a) != ops.copy(b)) for a, b in pairs)


def groups(replicas: tuple, centre: keras.Model, names: str) -> Iterator[tuple]:
    """Iterate over the variables of a kind: of all replicas, and of the centre."""
    lists = [getattr(model, names) for model in (*replicas, centre)]
    return ((variables, mean) for *variables, mean in zip(*lists))


def mean(variables: list[keras.Variable]) -> Any:
    """Return the mean of variables as an array."""
    first, *others = (ops.copy(v) for v in variables)
    return sum(others, first) / len(variables)


def mean_square_distance(replicas: tuple) -> Any:
    """Return the mean over replicas of ||w_a - mean||^2, of all trainable weights."""
    squares = [
        ops.sum(ops.square(ops.cast(ops.copy(v) - centre, "float32")))
        for variables in zip(*(r.trainable_variables for r in replicas))
        for centre in [mean(variables)]
        for v in variables
    ]
    return sum(squares) / len(replicas)
