"""The refusal of models whose own methods a model around them would not call."""

import keras

# What Keras trains, evaluates and predicts by: all of its trainer, and what that asks a layer for.
# (`loss` is an attribute that `compile` sets.)
_USED_BY_FIT = {
    name
    for cls in keras.Model.__mro__
    if cls.__name__.endswith("Trainer")
    for name in vars(cls)
    if not name.startswith("__") and name != "loss"
} | {"losses", "metrics_variables", "non_trainable_variables", "trainable_variables"}


def overrides_of(model: keras.Model) -> list[str]:
    """Return the names of methods of its own that a model around it would not call."""
    return [
        name
        for name in sorted(_USED_BY_FIT, key=lambda name: (name.startswith("_"), name))
        if getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model)
    ]


def check_overrides(model: keras.Model) -> None:
    """Refuse a model with methods of its own that a model around it would not call."""
    overridden = overrides_of(model)
    if not overridden:
        return
    remedy = "Derive its class from `RegularizedModel` instead of `keras.Model`."
    if hasattr(model, "preprocess_samples"):  # a task of KerasHub
        remedy = (
            "Call `RegularizedModel(model.input, model.output)`, which shares the layers and so "
            "the weights of `model`, and train it on preprocessed data, as "
            "`model.preprocess_samples(x, y)` returns them. `model` itself then evaluates and "
            "predicts as before."
        )
    raise ValueError(
        f"`model` must not override {', '.join(f'`{name}`' for name in overridden)}, which the "
        f"regularised model would not call. Received: model={model!r} (of type {type(model)}). "
        f"{remedy}"
    )
