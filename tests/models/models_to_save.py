"""Models that Keras can save and load, and how the tests of files train and compare them."""

import keras
import numpy as np
from frameworks import assert_array_equal
from keras import layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 2)).astype("float32")
register = keras.saving.register_keras_serializable("tests")


def net(units=2):
    return [layers.Dense(3, activation="tanh"), layers.Dense(units)]


def graph():
    inputs = x = keras.Input((4,))
    for layer in net():
        x = layer(x)
    return inputs, x


def set_up(model, units=2):
    model.hidden, model.out = net(units)


def call(model, inputs, training=None):
    return model.out(model.hidden(inputs))


@register
class Plain(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        set_up(self)

    call = call


@register
class Subclass(RegularizedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        set_up(self)

    call = call


@register
class WithArguments(RegularizedModel):
    def __init__(self, scale, units=2, **kwargs):
        super().__init__(**kwargs)
        set_up(self, units)
        self.scale = scale

    def call(self, inputs, training=None):
        return self.scale * call(self, inputs, training)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "units": self.out.units}


@register
class FunctionalSubclass(RegularizedModel):
    def __init__(self, **kwargs):
        inputs, outputs = graph()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)


@register
class FunctionalWithArguments(RegularizedModel):
    def __init__(self, scale, name=None):
        inputs, outputs = graph()
        super().__init__(inputs, layers.Rescaling(scale)(outputs), name=name)
        self.scale = scale

    def get_config(self):
        return {"scale": self.scale, "name": self.name}


@register
class PlainFunctionalSubclass(keras.Model):
    def __init__(self, **kwargs):
        inputs, outputs = graph()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)


def sequential(built=True):
    return keras.Sequential([*([keras.Input((4,))] if built else []), *net()])


WAYS = {
    "functional": lambda: RegularizedModel(*graph()),
    "subclass": Subclass,
    "subclass, arguments": lambda: WithArguments(0.5),
    "functional subclass": FunctionalSubclass,
    "functional subclass, arguments": lambda: FunctionalWithArguments(0.5),
    "from Functional": lambda: RegularizedModel.from_model(keras.Model(*graph())),
    "from Sequential": lambda: RegularizedModel.from_model(sequential()),
    "from deferred Sequential": lambda: RegularizedModel.from_model(sequential(built=False)),
    "from subclass": lambda: RegularizedModel.from_model(Plain()),
    "from functional subclass": lambda: RegularizedModel.from_model(PlainFunctionalSubclass()),
}
FEW = ["functional", "subclass", "from deferred Sequential", "from subclass"]


def regularizer(beta=3.0):
    return SubBatchPerturbation(0.1, beta, num_sub_batches=2)


def compiled(model, optimizer=None, **kwargs):
    """Compile a model to run eagerly, which for a few tiny steps is faster than tracing them."""
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    kwargs = {"regularizer": regularizer(), "run_eagerly": True, **kwargs}
    model.compile(optimizer, "mse", **kwargs)
    return model


def train(model, steps=1):
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def state(model):
    """Return all that training changes."""
    variables = model.optimizer.variables if model.compiled else []
    return [*model.get_weights(), *(v.numpy() for v in variables)]


def assert_same_state(a, b):
    for x, y in zip(state(a), state(b), strict=True):
        assert_array_equal(x, y)


def assert_different_state(a, b):
    assert any(not np.array_equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def from_file(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


def prepared(make, is_compiled, steps=0):
    model = make()
    model(X)
    if is_compiled:
        if isinstance(model, RegularizedModel):
            compiled(model, regularizer=None)
        else:
            model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", run_eagerly=True)
        model.optimizer.build(model.trainable_variables)
        train(model, steps)
    return model
