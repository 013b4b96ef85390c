"""Random Functional models of Keras's layers, with losses, labels and settings of a step.

`Case.of(seed)` draws one. All that it says of a case is plain: what it prints makes it again, and
each layer draws its arguments by itself, so that a case can be made smaller without changing what
is left of it.
"""

import dataclasses

import keras
import layer_table
import numpy as np
from frameworks import BACKEND
from keras import layers
from layer_table import FLAT, IMAGE, IN_FLOAT32, NAMES, OF_COLOURS, SHAPES, TABLE, WORDS, pick

LARGEST = 150  # numbers an example that a layer may give; more are averaged


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """A model, its data and how it is trained.

    Attributes:
        seed: Integer, of the weights and of the data.
        steps: Tuple of pairs of the name of a layer and the seed of its arguments.
        loss: Name of a loss of Keras.
        loss_seed: Integer, of the loss's arguments and the kind of its labels.
        reduction: String, of the loss.
        shared: Boolean, whether a layer is called twice.
        nested: Boolean, whether all layers but the first are in models of their own.
        wrapped: Boolean, whether the model is made by `from_model`.
        two_outputs: Boolean.
        frozen: Boolean, whether the layers that the first step makes do not train.
        weighted: Boolean, whether there are sample weights.
        batch_sizes: Tuple of integers, the examples of each training step.
        rule: Arguments of `SubBatchPerturbation`, as a tuple of pairs.
        mode: `"eager"`, `"graph"` or `"xla"`.
        policy: String, the dtype policy.
    """

    seed: int = 0
    steps: tuple = ()
    loss: str = "MeanSquaredError"
    loss_seed: int = 0
    reduction: str = "sum_over_batch_size"
    shared: bool = False
    nested: bool = False
    wrapped: bool = False
    two_outputs: bool = False
    frozen: bool = False
    weighted: bool = False
    batch_sizes: tuple = (4,)
    rule: tuple = (("num_sub_batches", 2),)
    mode: str = "eager"
    policy: str = "float64"

    @classmethod
    def of(cls, seed, modes=("eager",) * 30 + ("graph",) * 7 + ("xla",)):
        """Draw a case. Successive seeds go through all layers, as the first one, and all losses."""
        draw = np.random.default_rng(seed)
        names = [NAMES[seed % len(NAMES)], *draw.choice(NAMES, draw.integers(0, 4))]
        losses = sorted(LOSSES)
        loss = losses[seed % len(losses)]
        main = pick(draw, "auto", "full_batch", "sub_batches")
        reductions = ["sum_over_batch_size"] * 5 + ["mean"]
        if main != "sub_batches":
            reductions += ["sum", "mean_with_sample_weight"]
        count = int(draw.integers(1, 5))
        size = int(draw.integers(2, 7))  # perhaps smaller than the number of sub-batches
        mode = pick(draw, *modes)
        # Where the size of a batch is not known there are surplus slices to choose from.
        least = 1 if mode == "eager" else min(count, size)
        rule = {
            "num_sub_batches": count,
            "main_gradient": main,
            "num_perturbed": pick(draw, None, None, int(draw.integers(1, count + 1))),
            "estimator": pick(draw, *["finite_difference"] * 3, "hessian_vector_product"),
        }
        if loss in WITHOUT_SECOND_DERIVATIVES:
            del rule["estimator"]
        some = lambda share: bool(draw.random() < share)  # noqa: E731
        return cls(
            seed=seed,
            steps=tuple((str(name), int(draw.integers(1000))) for name in names),
            loss=loss,
            loss_seed=int(draw.integers(1000)),
            reduction=str(pick(draw, *reductions)),
            shared=some(0.2),
            nested=some(0.2),
            wrapped=some(0.2),
            two_outputs=some(0.2),
            frozen=some(0.2),
            weighted=some(0.4),
            batch_sizes=(size, int(draw.integers(least, size + 1)))[: draw.integers(1, 3)],
            rule=tuple(rule.items()),
            mode=mode,
        )

    def __repr__(self):
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        unusual = [f"{name}={v!r}" for name, (v, default) in values.items() if v != default]
        return f"Case({', '.join(unusual)})"

    def smaller(self):
        """Yield cases with one thing less."""
        for k in range(len(self.steps)):
            yield dataclasses.replace(self, steps=self.steps[:k] + self.steps[k + 1 :])
        for field in dataclasses.fields(self):
            if field.name != "seed" and getattr(self, field.name) != field.default:
                yield dataclasses.replace(self, **{field.name: field.default})
        for name, value in self.rule:
            if name != "num_sub_batches" and value is not None:
                rest = tuple((k, v) for k, v in self.rule if k != name)
                yield dataclasses.replace(self, rule=rest)

    def smallest(self, fails):
        """Return the smallest case that still fails; `fails` is a function of a case."""
        for case in self.smaller():
            if fails(case):
                return case.smallest(fails)
        return self

    @property
    def rounding(self):
        """Return by how much layers that compute in float32 enlarge differences of 1e-16."""
        coarse = self.loss in LOSSES_IN_FLOAT32 or any(name in IN_FLOAT32 for name, _ in self.steps)
        return 1e-5 if coarse else 0.0

    @property
    def random(self):
        return np.random.default_rng((self.seed, 1))

    def build(self, base):
        """Return the model, an instance of `base`, with its weights drawn, and compiled plainly."""
        keras.utils.set_random_seed(self.seed)
        keras.config.set_dtype_policy(self.policy)
        inputs, x = self._body()
        outputs = self._heads(x)
        if self.wrapped and hasattr(base, "from_model"):
            model = base.from_model(keras.Model(inputs, outputs))
        else:
            model = base(inputs, outputs)
        self._draw_weights(model)
        return model

    def _body(self):
        inputs, x, made = [], None, []
        for k, (name, number) in enumerate(self.steps or [("Identity", 0)]):
            ranks, call = TABLE[name]
            draw = np.random.default_rng((number, k))
            if x is None or ranks == (WORDS,):
                kind = ranks[draw.integers(len(ranks))]
                inputs.append(keras.Input(SHAPES[kind], dtype="int32" if kind == WORDS else None))
                taken = inputs[-1]
            else:
                taken = x if _fits(x, name) else self._of_rank(x, draw.choice(ranks))
            if self.nested and k and ranks != (WORDS,):
                inner = keras.Input(taken.shape[1:])
                given = keras.Model(inner, call(inner, draw))(taken)
            else:
                given = call(taken, draw)
            given = _smaller(given)
            joined = x is not None and ranks == (WORDS,)
            x = layers.Concatenate()([_flat(x), _flat(given)]) if joined else given
            made.append(x)
        if self.frozen:
            for layer in keras.Model(inputs[:1], made[0]).layers:
                layer.trainable = False
        return inputs, x

    def _of_rank(self, x, rank):
        """Return a tensor of a rank's usual shape, made of all of another."""
        shape = SHAPES[int(rank)]
        return layers.Reshape(shape)(layers.Dense(int(np.prod(shape)), "sigmoid")(_flat(x)))

    def _heads(self, x):
        features = _flat(x)
        if self.shared:
            shared = layers.Dense(4, "tanh")
            features = shared(shared(layers.Dense(4)(features)))
        outputs = LOSSES[self.loss].head(features, self._loss_draw())
        return [outputs, layers.Dense(2)(features)] if self.two_outputs else outputs

    def _loss_draw(self):
        return np.random.default_rng((self.loss_seed, 2))

    def _draw_weights(self, model):
        draw = self.random
        for variable in model.weights:
            if "float" not in variable.dtype:
                continue
            value = keras.ops.convert_to_numpy(variable.value)
            moved = value + 0.1 * draw.normal(size=value.shape)
            if "moving_variance" in variable.path:
                moved = value * draw.uniform(0.5, 2, size=value.shape)
            if variable.trainable or "moving" in variable.path:
                variable.assign(moved)

    def compile_arguments(self, model):
        """Return arguments of `compile`, the losses made anew."""
        # XLA draws other random numbers, and torch compiles for minutes.
        random = any("seed" in v.path for v in model.non_trainable_variables)
        loss = LOSSES[self.loss].make(self._loss_draw(), self.reduction)
        if self.two_outputs:
            loss = [loss, keras.losses.MeanSquaredError(reduction=self.reduction)]
        return {
            "optimizer": keras.optimizers.SGD(1 / 8),  # through float32, where Keras takes it
            "loss": loss,
            "run_eagerly": self.mode == "eager",
            "jit_compile": self.mode == "xla" and not random and BACKEND != "torch",
        }

    def data(self, model, size):
        """Return `x, y, sample_weight` of some examples."""
        draw = np.random.default_rng((self.seed, 3))
        floats = "float32" if self.policy != "float64" else "float64"
        x = [self._values(draw, size, i).astype(floats) for i in model.inputs]
        y = LOSSES[self.loss].labels(self._loss_draw(), draw, size)
        y = y.astype(floats) if y.dtype == "float64" else y
        if self.two_outputs:
            y = [y, draw.normal(size=(size, 2)).astype(floats)]
        weights = draw.uniform(0.2, 3, size=size).astype(floats) if self.weighted else None
        return x if len(x) > 1 else x[0], y, weights

    def _values(self, draw, size, tensor):
        shape = (size, *tensor.shape[1:])
        if "int" in tensor.dtype:
            return draw.integers(0, layer_table.NUM_WORDS, shape).astype("int32")
        if len(shape) == 4:  # pixels
            return draw.uniform(size=shape)
        values = draw.normal(size=shape)
        if len(shape) == 3:
            values[:, -1] *= draw.integers(0, 2, (size, 1))  # for masks
        return values


def _fits(x, name):
    """Return whether a layer takes a tensor as it is."""
    if name in OF_COLOURS:
        return tuple(x.shape[1:]) == SHAPES[IMAGE]
    return len(x.shape) in TABLE[name][0] and min(x.shape[1:-1], default=3) >= 3


def _flat(x):
    return x if len(x.shape) == FLAT else layers.Flatten()(x)


def _smaller(x):
    while np.prod(x.shape[1:]) > LARGEST:
        x = keras.ops.mean(x, axis=1)
    return x


@dataclasses.dataclass(frozen=True)
class LossKind:
    """How to use a loss.

    Attributes:
        head: Function `(features, draw) -> outputs`.
        labels: Function `(loss_draw, draw, size) -> array`.
        make: Function `(draw, reduction) -> loss`.
    """

    head: object
    labels: object
    make: object


def _kind(name, head, labels, **choices):
    """Make a `LossKind`, whose arguments are drawn from lists of choices."""

    def arguments(draw):
        return {key: pick(draw, *values) for key, values in choices.items()}

    def make_head(features, draw):
        return head(features, arguments(draw))

    def make(draw, reduction):
        return getattr(keras.losses, name)(reduction=reduction, **arguments(draw))

    return LossKind(make_head, lambda draw, *args: labels(arguments(draw), *args), make)


def _dense(units, activation=None):
    return lambda x, _: layers.Dense(units, activation)(x)


def _classes(units, activation, x, arguments):
    return layers.Dense(units, None if arguments.get("from_logits") else activation)(x)


def _softmax(x, arguments):
    return _classes(3, "softmax", x, arguments)


def _sigmoid(x, arguments):
    return _classes(2, "sigmoid", x, arguments)


def _sigmoid_of_one(x, arguments):
    return _classes(1, "sigmoid", x, arguments)


def _by_step(x, arguments):
    return layers.Reshape((5, 4))(layers.Dense(20)(x))


def _image(x, arguments):
    return layers.Reshape((2, 2, 1))(layers.Dense(4, "sigmoid")(x))


def _normal(_, draw, size):
    return draw.normal(size=(size, 2))


def _positive(_, draw, size):
    return draw.uniform(0.5, 3, size=(size, 2))


def _signs(_, draw, size):
    return draw.choice([-1.0, 1.0], (size, 2))


def _bits(_, draw, size):
    return draw.integers(0, 2, (size, 2))


def _bits_in_an_image(_, draw, size):
    return draw.integers(0, 2, (size, 2, 2, 1)).astype("float64")


def _bit(_, draw, size):
    return draw.integers(0, 2, (size, 1)).astype("float64")


def _integers(_, draw, size):
    return draw.integers(0, 3, size)


def _integers_or_none(arguments, draw, size):
    labels = draw.integers(0, 3, size)
    if arguments["ignore_class"] is not None:
        labels[draw.random(size) < 0.3] = arguments["ignore_class"]
    return labels


def _one_hot(_, draw, size):
    return np.eye(3)[draw.integers(0, 3, size)]


def _soft(_, draw, size):
    return draw.dirichlet(np.ones(3), size)


def _words(_, draw, size):
    return draw.integers(1, 4, (size, 2))


LOGITS = {"from_logits": [True, False]}
SMOOTH = {"label_smoothing": [0.0, 0.0, 0.25]}
LOSSES = {
    "BinaryCrossentropy": _kind("BinaryCrossentropy", _sigmoid, _bits, **LOGITS, **SMOOTH),
    "BinaryCrossentropy of one": _kind("BinaryCrossentropy", _sigmoid_of_one, _bit, **LOGITS),
    "BinaryFocalCrossentropy": _kind("BinaryFocalCrossentropy", _sigmoid, _bits, **LOGITS),
    "CTC": _kind("CTC", _by_step, _words),
    "CategoricalCrossentropy": _kind(
        "CategoricalCrossentropy", _softmax, _one_hot, **LOGITS, **SMOOTH
    ),
    "CategoricalCrossentropy soft": _kind("CategoricalCrossentropy", _softmax, _soft, **LOGITS),
    "CategoricalFocalCrossentropy": _kind(
        "CategoricalFocalCrossentropy", _softmax, _one_hot, **LOGITS
    ),
    "CategoricalGeneralizedCrossEntropy": _kind(
        "CategoricalGeneralizedCrossEntropy", _dense(3, "softmax"), _integers, q=[0.5, 0.75]
    ),
    "CategoricalHinge": _kind("CategoricalHinge", _dense(3), _one_hot),
    "Circle": _kind("Circle", _dense(3, "tanh"), _integers, gamma=[2.0], margin=[0.4, 0.25]),
    "CosineSimilarity": _kind("CosineSimilarity", _dense(2), _normal),
    "Dice": _kind("Dice", _image, _bits_in_an_image, axis=[None, (1, 2, 3)]),
    "Hinge": _kind("Hinge", _dense(2), _signs),
    "Huber": _kind("Huber", _dense(2), _normal, delta=[0.5, 1.0]),
    "KLDivergence": _kind("KLDivergence", _dense(3, "softmax"), _soft),
    "LogCosh": _kind("LogCosh", _dense(2), _normal),
    "MeanAbsoluteError": _kind("MeanAbsoluteError", _dense(2), _normal),
    "MeanAbsolutePercentageError": _kind("MeanAbsolutePercentageError", _dense(2), _positive),
    "MeanSquaredError": _kind("MeanSquaredError", _dense(2), _normal),
    "MeanSquaredLogarithmicError": _kind(
        "MeanSquaredLogarithmicError", _dense(2, "softplus"), _positive
    ),
    "Poisson": _kind("Poisson", _dense(2, "softplus"), _positive),
    "SparseCategoricalCrossentropy": _kind(
        "SparseCategoricalCrossentropy",
        _softmax,
        _integers_or_none,
        ignore_class=[None, -1],
        **LOGITS,
    ),
    "SquaredHinge": _kind("SquaredHinge", _dense(2), _signs),
    "Tversky": _kind("Tversky", _image, _bits_in_an_image, alpha=[0.25, 0.5]),
}
# Keras's Circle gives NaN on every backend, CTC on TensorFlow, and torch refuses it.
WITHOUT_SECOND_DERIVATIVES = ("CTC", "Circle")
LOSSES_IN_FLOAT32 = ("CTC",)
EXCLUDED_LOSSES = {"Loss": "is abstract"}
