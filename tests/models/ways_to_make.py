"""The same small net, made in every way in which Keras and this package make models."""

import keras
import numpy as np
from keras import layers

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(2).normal(size=(8, 2)).astype("float32")


def graph(name=None):
    """Return inputs and outputs of a net of two dense layers."""
    inputs = keras.Input((4,), name=name)
    outputs = layers.Dense(2)(layers.Dense(3, activation="tanh")(inputs))
    return inputs, outputs


def two_dense(model):
    model.hidden = layers.Dense(3, activation="tanh")
    model.out = layers.Dense(2)


def make_subclass(base=RegularizedModel):
    class Net(base):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            two_dense(self)

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    return Net


def make_subclass_with_training(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            super().__init__()
            two_dense(self)

        def call(self, x, training=None):
            return self.out(self.hidden(x, training=training), training=training)

    return Net


def make_subclass_with_arguments(base=RegularizedModel):
    class Net(base):
        def __init__(self, hidden, units):  # two positional arguments, as inputs and outputs
            super().__init__(name="net")
            self.hidden = layers.Dense(hidden, activation="tanh")
            self.out = layers.Dense(units)

        def call(self, inputs, training=False, mask=None):
            return self.out(self.hidden(inputs))

    return Net


def make_subclass_without_init(base=RegularizedModel):
    class Net(base):
        def build(self, input_shape):
            two_dense(self)
            self.hidden.build(input_shape)
            self.out.build((None, 3))
            self.built = True

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    return Net


def make_functional_subclass(base=RegularizedModel):
    class Net(base):
        def __init__(self, units=2):
            inputs = keras.Input((4,))
            outputs = layers.Dense(units)(layers.Dense(3, activation="tanh")(inputs))
            super().__init__(inputs=inputs, outputs=outputs, name="net")

    return Net


def make_functional_subclass_positional(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            super().__init__(*graph())
            self.units = 2

    return Net


def make_functional_subclass_with_call(base=RegularizedModel):
    class Net(base):
        def __init__(self):
            self.was_called = False
            super().__init__(*graph(), name="net")

        def call(self, inputs, training=None, mask=None):
            self.was_called = True
            return super().call(inputs, training=training, mask=mask)

    return Net


def make_subclass_that_passes_on_arguments(base=RegularizedModel):
    class Net(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    return Net


def make_subclass_with_mixin(base=RegularizedModel):
    class Mixin:
        def greet(self):
            return "hello"

    class Net(Mixin, base):
        def __init__(self):
            super().__init__(*graph())

    return Net


def sequential(built=True):
    first = [keras.Input((4,))] if built else []
    return keras.Sequential([*first, layers.Dense(3, activation="tanh"), layers.Dense(2)])


SINGLE = {
    "functional": lambda: RegularizedModel(*graph()),
    "functional, keywords": lambda: RegularizedModel(inputs=(g := graph())[0], outputs=g[1]),
    "functional, outputs keyword": lambda: RegularizedModel((g := graph())[0], outputs=g[1]),
    "subclass": lambda: make_subclass()(),
    "subclass, training argument": lambda: make_subclass_with_training()(),
    "subclass, arguments": lambda: make_subclass_with_arguments()(3, 2),
    "subclass, build": lambda: make_subclass_without_init()(),
    "functional subclass": lambda: make_functional_subclass()(),
    "functional subclass, positional": lambda: make_functional_subclass_positional()(),
    "functional subclass, call": lambda: make_functional_subclass_with_call()(),
    "functional subclass, *args": lambda: make_subclass_that_passes_on_arguments()(*graph()),
    "functional subclass, mixin": lambda: make_subclass_with_mixin()(),
    "from Functional": lambda: RegularizedModel.from_model(keras.Model(*graph())),
    "from Sequential": lambda: RegularizedModel.from_model(sequential()),
    "from deferred Sequential": lambda: RegularizedModel.from_model(sequential(built=False)),
    "from subclass": lambda: RegularizedModel.from_model(make_subclass(keras.Model)()),
    "from subclass, training argument": lambda: RegularizedModel.from_model(
        make_subclass_with_training(keras.Model)()
    ),
    "from functional subclass": lambda: RegularizedModel.from_model(
        make_functional_subclass(keras.Model)()
    ),
}


def weights_like(model):
    """Return weights of the model's shapes, the same at each call."""
    rng = np.random.default_rng(3)
    return [0.5 * rng.normal(size=w.shape) for w in model.get_weights()]


def compile_small(model, loss="mse", regularizer="set", **kwargs):
    """Compile for two sub-batches; a few tiny steps run faster eagerly than they are traced."""
    if regularizer == "set":
        regularizer = SubBatchPerturbation(
            alpha=0.1, num_sub_batches=2, main_gradient="full_batch", **kwargs
        )
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True, regularizer=regularizer)


def trained_weights(model, x=X, y=Y, loss="mse", **kwargs):
    """Return the weights after two regularised steps from weights that are always the same."""
    if not model.built:
        model(x)
    model.set_weights(weights_like(model))
    compile_small(model, loss, **kwargs)
    for _ in range(2):
        model.train_on_batch(x, y)
    return model.get_weights()


# Several inputs and outputs: the same net, its input cut in two, its output sent out twice.

X2 = {"left": X[:, :2], "right": X[:, 2:]}
Y2 = {"once": Y, "twice": 2 * Y}


def graph_of_several(structure):
    inputs = {"left": keras.Input((2,), name="left"), "right": keras.Input((2,), name="right")}
    hidden = layers.Dense(3, activation="tanh")(layers.Concatenate()(list(inputs.values())))
    outputs = {"once": layers.Dense(2, name="once")(hidden)}
    outputs["twice"] = layers.Rescaling(2.0, name="twice")(outputs["once"])
    return structure(inputs), structure(outputs)


def make_subclass_of_several(base, structure):
    class Net(base):
        def __init__(self):
            super().__init__()
            two_dense(self)

        def call(self, inputs, training=None):
            left, right = inputs.values() if isinstance(inputs, dict) else inputs
            once = self.out(self.hidden(keras.ops.concatenate([left, right], axis=-1)))
            return structure({"once": once, "twice": 2.0 * once})

    return Net


def as_dict(x):
    return dict(x)


def as_list(x):
    return list(x.values())


# Models of plain Keras, from which `from_model` makes regularised ones.

ORIGINALS = {
    "Functional": lambda: keras.Model(*graph(), name="original"),
    "Sequential": sequential,
    "deferred Sequential": lambda: sequential(built=False),
    "subclass": make_subclass(keras.Model),
    "subclass, training argument": make_subclass_with_training(keras.Model),
    "functional subclass": make_functional_subclass(keras.Model),
    "functional subclass, call": make_functional_subclass_with_call(keras.Model),
}
