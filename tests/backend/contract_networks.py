"""Networks, in Keras and in NumPy, against which `keras_infomcr.backend` is tested.

The oracles (`numpy_layers`) know the weights alone. Tolerances are errors in norm, relative to the
norm of what is expected; weights, data and losses are of order one.

* `ROUNDING`: in float64 (epsilon 2e-16) a loss or a gradient takes some 1e3 operations, and the
  complex step is exact to rounding: 1e3 * 2e-16, and a factor 5 for cancellation. 1e-12.
* `STENCIL`: the oracle of H v is off by 4e-12 of the gradient that it differences (its docstring),
  and H v may be a hundredth of that. 1e-9.
* `DIFFERENCE`: losses are off by some 1e-15 and R_alpha, the difference of two, is of the order
  alpha |g|^2, at least 1e-4 here; likewise the gradients. 1e-10.
* `SINGLE`: in float32 (epsilon 6e-8) some 1e2 operations and the divisions by standard deviations
  leave 1e-5 of H v, and with alpha = 0.03 the like of a difference of gradients. 1e-4. It also
  stands for float64 where JAX attends: `jax.nn.dot_product_attention` has its softmax in float32.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import numpy_layers as oracle
import pytest
from frameworks import BACKEND, array, numpy, only_on
from keras import layers

from keras_infomcr import RegularizedModel, backend
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation

ROUNDING, STENCIL, DIFFERENCE, SINGLE = 1e-12, 1e-9, 1e-10, 1e-4

ALPHA = 0.03
ESTIMATORS = "finite_difference", "hessian_vector_product"
SIZES = [2, 3]  # of the sub-batches of a batch of 5
VOCABULARY = 5
FIXED = {
    "moving_mean": np.array([0.5, -0.25, 0.125]),
    "moving_variance": np.array([1.5, 0.75, 2.0]),
    "gamma": np.array([-0.5, 1.25, 0.75]),
    "beta": np.array([0.25, 0.5, -0.125]),
}

on_tensorflow = only_on("tensorflow", reason="tf.nn.moments is TensorFlow's")
on_torch = only_on("torch", reason="of torch's parameters and generator")

# Both functions that return the gradients of several values, by what they promise.
ROWS = {"by_example": backend.gradients_by_example, "whole": backend.jacobian}
each_rows = pytest.mark.parametrize("make_rows", ROWS.values(), ids=ROWS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, in Keras and in NumPy.

    Attributes:
        name: Name of the layer that it is about.
        shape: Shape of an example.
        layers: Function from a Keras tensor to predictions.
        forward: Function `(weights, x) -> predictions`, in NumPy; `(weights, x, mask)` where
            `drops`.
        loss: `"squared_error"` or `"cross_entropy"`.
        integers: Whether an example is made of integers below `VOCABULARY`.
        couples: Whether an example's loss depends on the other examples.
        drops: Whether the inputs go through a layer named `"dropout"`.
        single_on: A backend that computes the layer in float32 even where Keras has float64.
    """

    name: str
    shape: tuple
    layers: Callable
    forward: Callable
    loss: str = "squared_error"
    integers: bool = False
    couples: bool = False
    drops: bool = False
    single_on: str = ""

    def tolerance(self, tolerance):
        return SINGLE if self.single_on == BACKEND else tolerance


def conv_2d(w, x):
    hidden = np.tanh(oracle.conv_2d(x, w[0], w[1], stride=2, padding=(0, 1)))
    return oracle.flatten(hidden) @ w[2] + w[3]


def depthwise_conv_2d(w, x):
    return oracle.flatten(np.tanh(oracle.depthwise_conv_2d(x, w[0], w[1]))) @ w[2] + w[3]


def batch_norm_training(w, x):
    hidden = oracle.normalize_by_own_moments(x @ w[0] + w[1], (0, 1, 2), w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def batch_norm_inference(w, x):
    moments = FIXED["moving_mean"], FIXED["moving_variance"]
    hidden = oracle.normalize(x @ w[0] + w[1], *moments, w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def frozen_batch_norm(w, x):
    return batch_norm_inference([w[0], w[1], FIXED["gamma"], FIXED["beta"], w[2], w[3]], x)


def layer_norm(w, x):
    hidden = oracle.normalize_by_own_moments(x @ w[0] + w[1], -1, w[2], w[3])
    return np.tanh(hidden) @ w[4] + w[5]


def layer_norm_without_scale(w, x):
    return layer_norm([w[0], w[1], np.ones(4), *w[2:]], x)


def group_norm(w, x):
    hidden = oracle.group_norm(x @ w[0] + w[1], 2, w[2], w[3])
    return oracle.flatten(np.tanh(hidden)) @ w[4] + w[5]


def pooling(w, x):
    hidden = np.tanh(oracle.conv_2d(x, w[0], w[1]))
    return oracle.flatten(oracle.average_pool_2d(oracle.max_pool_2d(hidden))) @ w[2] + w[3]


def embedding(w, x):
    return np.tanh(oracle.flatten(w[0][x])) @ w[1] + w[2]


def lstm(w, x):
    return oracle.lstm(x, *w[:3]) @ w[3] + w[4]


def attention(w, x):
    query, value, scale = x @ w[0] + w[1], x @ w[2] + w[3], w[4]
    weights = oracle.softmax(scale * (query @ np.swapaxes(value, 1, 2)))
    return oracle.flatten(np.tanh(weights @ value)) @ w[5] + w[6]


def multi_head_attention(w, x):
    return oracle.flatten(np.tanh(oracle.self_attention(x, *w[:8]))) @ w[8] + w[9]


def perceptron(w, x, mask=1.0):
    return np.tanh((x * mask) @ w[0] + w[1]) @ w[2] + w[3]


def tanh_and_dense(x, units=2):
    return layers.Dense(units)(layers.Flatten()(layers.Activation("tanh")(x)))


def normalized(x, width, normalization):
    return tanh_and_dense(normalization(layers.Dense(width)(x)))


def pooled(x):
    x = layers.Conv2D(2, 2, activation="tanh")(x)
    x = layers.AveragePooling2D(2)(layers.MaxPooling2D(2)(x))
    return layers.Dense(2)(layers.Flatten()(x))


def attended(x):
    query, value = layers.Dense(2)(x), layers.Dense(2)(x)
    return tanh_and_dense(layers.Attention(use_scale=True)([query, value]))


def dropped(x, seed):
    x = layers.Dropout(0.5, seed=seed, name="dropout")(x)
    return layers.Dense(2)(layers.Dense(3, "tanh")(x))


def dropped_and_normalized(x):
    return normalized(layers.Dropout(0.5)(x), 3, layers.BatchNormalization())


# Keras's mean over a batch, Keras's losses of the examples, and these in NumPy.
LOSSES = {
    "squared_error": (
        keras.losses.MeanSquaredError,
        keras.losses.mean_squared_error,
        oracle.squared_errors,
    ),
    "cross_entropy": (
        functools.partial(keras.losses.CategoricalCrossentropy, from_logits=True),
        functools.partial(keras.losses.categorical_crossentropy, from_logits=True),
        oracle.cross_entropies,
    ),
}

CASES = [
    Case("dense", (4,), lambda x: layers.Dense(3)(layers.Dense(3, "tanh")(x)), perceptron,
         loss="cross_entropy"),
    Case("conv_2d", (4, 4, 2),
         lambda x: tanh_and_dense(layers.Conv2D(2, 3, strides=2, padding="same")(x)),
         conv_2d),
    Case("depthwise_conv_2d", (3, 3, 2),
         lambda x: tanh_and_dense(layers.DepthwiseConv2D(2, depth_multiplier=2)(x)),
         depthwise_conv_2d),
    Case("batch_norm", (2, 2, 2),
         lambda x: normalized(x, 3, layers.BatchNormalization()), batch_norm_training,
         couples=True),
    Case("frozen_batch_norm", (2, 2, 2),
         lambda x: normalized(x, 3, layers.BatchNormalization(trainable=False)),
         frozen_batch_norm),
    Case("layer_norm", (3,), lambda x: normalized(x, 4, layers.LayerNormalization()), layer_norm),
    Case("layer_norm_without_scale", (3,),
         lambda x: normalized(x, 4, layers.LayerNormalization(scale=False)),
         layer_norm_without_scale),
    Case("group_norm", (2, 2, 2), lambda x: normalized(x, 4, layers.GroupNormalization(2)),
         group_norm),
    Case("pooling", (5, 5, 1), pooled, pooling),
    Case("embedding", (3,), lambda x: tanh_and_dense(layers.Embedding(VOCABULARY, 2)(x)),
         embedding, integers=True),
    Case("lstm", (3, 2), lambda x: layers.Dense(2)(layers.LSTM(2)(x)), lstm),
    Case("attention", (3, 2), attended, attention),
    Case("multi_head_attention", (3, 2),
         lambda x: tanh_and_dense(layers.MultiHeadAttention(num_heads=2, key_dim=4)(x, x), 3),
         multi_head_attention, loss="cross_entropy", single_on="jax"),
    Case("dropout", (6,), lambda x: dropped(x, seed=7), perceptron, drops=True),
]  # fmt: skip
if BACKEND == "torch":  # the others draw a seed when the layer is made
    CASES.append(
        Case("unseeded_dropout", (6,), lambda x: dropped(x, seed=None), perceptron, drops=True)
    )
NAMED = {case.name: case for case in CASES}
NORMALIZATIONS = [NAMED[name] for name in ("batch_norm", "layer_norm", "group_norm")]
MODES = [(NAMED["batch_norm"], batch_norm_inference), (NAMED["dropout"], perceptron)]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Net:
    """A compiled model with weights, an objective and a batch; their like in NumPy.

    All numbers are float32's, so that a float32 model stands at the same point.

    Args:
        case: A `Case`.
        dtype: The dtype of weights and inputs.
    """

    def __init__(self, case, dtype="float64"):
        rng = np.random.default_rng(0)
        inputs = keras.Input(case.shape, dtype="int32" if case.integers else dtype)
        self.case = case
        self.model = RegularizedModel(inputs, case.layers(inputs))
        keras_loss, self.keras_losses, self.numpy_losses = LOSSES[case.loss]
        self.model.compile("sgd", keras_loss())
        self.points = [draw(rng, v.shape) for v in self.model.trainable_variables]
        for variable, point in zip(self.model.trainable_variables, self.points):
            variable.assign(point.astype(dtype))
        for variable in self.model.non_trainable_variables:
            if variable.name in FIXED:
                variable.assign(FIXED[variable.name].astype(dtype))
        self.x = draw(rng, (sum(SIZES), *case.shape))
        if case.integers:
            self.x = rng.integers(VOCABULARY, size=self.x.shape).astype("int32")
        self.y = draw(rng, (sum(SIZES), *self.model.output_shape[1:]))
        if case.loss == "cross_entropy":
            self.y = (np.arange(self.y.shape[1]) == self.y.argmax(1)[:, None]).astype(float)
        self.objective = Objective(self.model)
        self.weights, self.state = self.objective.weights(), self.objective.state()
        self.args = array(self.x, None if case.integers else dtype), array(self.y, dtype)

    def point(self, *vector):
        """Return the arguments of a differentiated objective."""
        return self.weights, *vector, self.state, Batch(*self.args)

    def example_losses(self, weights, state, x, y, training=True):
        """Return the losses of the examples, of which the functions in `ROWS` take gradients."""
        with self.objective.at(weights, state, training) as (predict, _):
            return keras.ops.cast(self.keras_losses(y, predict(x)), backend.widest_float())

    def masks(self, sizes):
        """Return the masks of successive draws, of `sizes` examples each."""
        with self.objective.at(self.weights, self.state, training=True):
            dropout = self.model.get_layer("dropout")
            ones = [keras.ops.ones((size, *self.case.shape)) for size in sizes]
            return [numpy(dropout(x, training=True)) for x in ones]

    def numpy_parts(self, sizes):
        """Return functions `weights -> losses` of contiguous parts of the batch."""
        stops = np.cumsum(sizes)
        masks = self.masks(sizes) if self.case.drops else [None] * len(sizes)
        return [
            self.numpy_function(slice(stop - size, stop), mask)
            for stop, size, mask in zip(stops, sizes, masks)
        ]

    def numpy_function(self, rows, mask=None, forward=None):
        forward = forward or self.case.forward
        extra = [] if mask is None else [mask]

        def losses(weights):
            return self.numpy_losses(self.y[rows], forward(weights, self.x[rows], *extra))

        return losses

    def numpy_losses_of_batch(self):
        return self.numpy_parts([len(self.x)])[0]


def draw(rng, shape):
    return np.asarray(rng.normal(scale=0.7, size=shape), "float32").astype("float64")


@functools.cache
def xla_options():
    """Return what makes XLA compile faster by a third, where this version of it knows it."""
    import jax

    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options)(1.0)
    except Exception:
        return None
    return options


def at_once(function, *args):
    """Call a function, on JAX as one program: it would compile every operation by itself."""
    if BACKEND == "jax":
        import jax

        function = jax.jit(function, compiler_options=xla_options())
    return function(*args)


def mean_of(losses):
    return lambda weights: losses(weights).mean()


def flat(arrays, like=None):
    """Concatenate arrays; `None` counts as zeros of the shape in `like`."""
    like = arrays if like is None else like
    parts = [np.zeros(b.shape) if a is None else numpy(a) for a, b in zip(arrays, like)]
    assert [p.shape for p in parts] == [tuple(b.shape) for b in like]
    return np.concatenate([p.ravel() for p in parts]).astype("float64")


def assert_close(got, expected, tolerance):
    """Compare lists of arrays, or numbers, in norm."""
    if isinstance(expected, list):
        got, expected = flat(got, expected), flat(expected)
    assert np.linalg.norm(expected) > 1e-3, "the oracle shows nothing"
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def random_vector(net):
    rng = np.random.default_rng(1)
    return [draw(rng, w.shape) for w in net.points]


def as_arrays(values):
    return [array(v) for v in values]


def regularize(net, *estimators, alpha=ALPHA):
    """Return the value, the gradient and the gradient of the loss, by each of the estimators."""

    def averages(*batch):
        results = [
            SubBatchPerturbation(alpha, 1.0, len(SIZES), "sub_batches", estimator=estimator)(
                net.objective, Batch(*batch), []
            )
            for estimator in estimators
        ]
        return [(r.value, r.gradient, r.main.gradients) for r in results]

    return at_once(averages, *net.args)
