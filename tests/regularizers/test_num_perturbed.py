"""`num_perturbed`: a random subset of the sub-batches is perturbed, in place of all of them."""

import itertools
import warnings

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy, only_on

from keras_infomcr import RegularizedModel, regularizers
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation

M = 4
ESTIMATORS = ["finite_difference", "hessian_vector_product"]
MAIN_GRADIENTS = ["sub_batches", "full_batch"]


def make(num_perturbed, normalize=False, num_sub_batches=M, **kwargs):
    inputs = keras.Input((3,))
    x = keras.layers.Dense(5, "tanh")(inputs)
    if normalize:
        x = keras.layers.BatchNormalization()(x)
    model = RegularizedModel(inputs, keras.layers.Dense(2)(x))
    compiling = {key: kwargs.pop(key) for key in ("jit_compile", "run_eagerly") if key in kwargs}
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.5),
        "mse",
        regularizer=SubBatchPerturbation(
            0.1, 2.0, num_sub_batches, num_perturbed=num_perturbed, **kwargs
        ),
        **compiling,
    )
    return model


def data(rng, number=8):
    return (
        rng.normal(size=(number, 3)).astype("float32"),
        rng.normal(size=(number, 2)).astype("float32"),
    )


def flat(arrays):
    return np.concatenate([np.ravel(numpy(a)) for a in arrays])


@pytest.mark.slow
@pytest.mark.parametrize("number", [8, 7])
@pytest.mark.parametrize("num_perturbed", [1, 2, 3])
@pytest.mark.parametrize("main_gradient", MAIN_GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_over_all_subsets_is_the_whole(
    float64, estimator, main_gradient, num_perturbed, number, rng, monkeypatch
):
    x, y = (array(a, "float64") for a in data(rng, number))
    settings = {"estimator": estimator, "main_gradient": main_gradient}
    model = make(None, normalize=True, **settings)
    weights = model.get_weights()
    whole = model.regularizer(Objective(model), Batch(x, y), [])

    model = make(num_perturbed, normalize=True, **settings)
    model.set_weights(weights)

    def with_ranks(ranks):
        monkeypatch.setattr(model.regularizer, "_random_ranks", lambda *_: ranks)
        result = model.regularizer(Objective(model), Batch(x, y), [])
        return result.value, result.gradient, result.main and result.main.gradients

    if BACKEND == "jax":
        import jax

        with_ranks = jax.jit(with_ranks)
    found = []
    for subset in itertools.combinations(range(M), num_perturbed):
        rest = [i for i in range(M) if i not in subset]
        ranks = np.argsort([*subset, *rest])  # lowest where a sub-batch is perturbed
        value, gradient, loss_gradient = with_ranks(array(ranks))
        found.append([float(numpy(value)), *flat(gradient)])
        if main_gradient == "sub_batches":
            np.testing.assert_allclose(flat(loss_gradient), flat(whole.main.gradients), atol=1e-14)
    expected = [float(numpy(whole.value)), *flat(whole.gradient)]
    # The gradients are of order one and their differences of order 0.1, all in float64.
    np.testing.assert_allclose(np.mean(found, axis=0), expected, rtol=1e-12, atol=1e-14)
    assert np.std(found, axis=0)[0] > 0.01 * expected[0]


def test_every_subset_comes_up_and_follows_from_the_step():
    regularizer = SubBatchPerturbation(num_sub_batches=M, num_perturbed=2)
    ranks = [numpy(regularizer._random_ranks(M, array(step, "int32"))) for step in range(300)]
    subsets = [frozenset(np.flatnonzero(r < 2)) for r in ranks]
    counts = [subsets.count(frozenset(pair)) for pair in itertools.combinations(range(M), 2)]
    assert sum(counts) == 300
    # Each of 6 subsets is expected 50 times in 300 draws, within five standard deviations of a
    # binomial count.
    np.testing.assert_allclose(counts, 50, atol=5 * np.sqrt(300 / 6 * 5 / 6))
    again = SubBatchPerturbation(num_sub_batches=M, num_perturbed=2)
    np.testing.assert_array_equal(numpy(again._random_ranks(M, array(7, "int32"))), ranks[7])


@pytest.mark.slow
@pytest.mark.parametrize("main_gradient", MAIN_GRADIENTS)
def test_all_sub_batches_are_the_default(main_gradient, rng):
    x, y = data(rng, 22)
    trained = []
    for num_perturbed in (None, M):
        keras.utils.set_random_seed(0)
        model = make(num_perturbed, normalize=True, main_gradient=main_gradient)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        trained.append(flat(model.get_weights()))
    np.testing.assert_array_equal(*trained)


MODES = [
    {},
    {"run_eagerly": True},
    pytest.param(
        {"jit_compile": True},
        marks=only_on(
            "tensorflow", "jax", reason="`torch.compile` takes half a minute for each model."
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("main_gradient", MAIN_GRADIENTS)
def test_steps_are_those_of_the_subsets_of_their_numbers(main_gradient, mode, rng, monkeypatch):
    """The steps agree however they are run, and whatever size the last batch has."""

    def rotated(self, count, step):  # XLA draws other random numbers
        return keras.ops.mod(keras.ops.arange(count) + keras.ops.cast(step, "int32"), count)

    monkeypatch.setattr(SubBatchPerturbation, "_random_ranks", rotated)
    x, y = data(rng, 22)
    model = make(2, main_gradient=main_gradient, **mode)
    reference = make(2, main_gradient=main_gradient, run_eagerly=True)
    reference.set_weights(model.get_weights())
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    velocity = [0.0] * 4
    for step, start in enumerate([0, 8, 16] * 2):
        batch = Batch(array(x[start : start + 8]), array(y[start : start + 8]))
        reference.optimizer.iterations.assign(step)
        result = reference.regularizer(Objective(reference), Batch(*batch), [])
        # No layer couples the examples, so that the sub-batches' mean gradient is the batch's.
        plain = make(None, main_gradient="sub_batches", run_eagerly=True)
        plain.set_weights(reference.get_weights())
        main = plain.regularizer(Objective(plain), Batch(*batch), []).main.gradients
        gradients = [numpy(g) + 2 * numpy(r) for g, r in zip(main, result.gradient)]
        velocity = [0.5 * v - 0.1 * g for v, g in zip(velocity, gradients)]
        for variable, v in zip(reference.trainable_variables, velocity):
            variable.assign(numpy(variable) + v)
    # Float32 rounds gradients of order one, over six steps.
    np.testing.assert_allclose(flat(model.get_weights()), flat(reference.get_weights()), atol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_subsets(rng, tmp_path):
    x, y = data(rng, 24)
    model = make(1, normalize=True)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.regularizer.num_perturbed == 1
    for one in (model, loaded):
        one.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    np.testing.assert_allclose(
        flat(loaded.get_weights()), flat(model.get_weights()), rtol=1e-6, atol=1e-7
    )


class Counting(keras.layers.Layer):
    calls = 0

    def call(self, x):
        Counting.calls += 1
        return x


@only_on(
    "tensorflow", "torch", reason="JAX traces both branches, whether they are executed or not."
)
@pytest.mark.parametrize(
    "num_perturbed", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))]
)
def test_cost_falls_with_the_sub_batches_that_are_perturbed(num_perturbed, rng):
    """Count the evaluations of sub-batches, each an eighth of the batch.

    If the sub-batches give the main gradient, there are 8 of them and k perturbed ones. If not,
    there is one evaluation of the whole batch, and k pairs.
    """
    for main_gradient, expected in (("sub_batches", 8 + num_perturbed), ("full_batch", None)):
        inputs = keras.Input((3,))
        outputs = keras.layers.Dense(2)(Counting()(inputs))
        model = RegularizedModel(inputs, outputs)
        regularizer = SubBatchPerturbation(
            num_sub_batches=8, num_perturbed=num_perturbed, main_gradient=main_gradient
        )
        model.compile("sgd", "mse", regularizer=regularizer, run_eagerly=True)
        x, y = data(rng, 16)
        model.train_on_batch(x, y)
        Counting.calls = 0
        model.train_on_batch(x, y)
        assert Counting.calls == (expected or 1 + 2 * num_perturbed)


class Unused(keras.layers.Layer):
    def build(self, shape):
        self.unused = self.add_weight(shape=(2,), initializer="ones")

    def call(self, x):
        return x


@pytest.mark.parametrize("main_gradient", MAIN_GRADIENTS)
def test_weights_that_are_not_used_stay_without_a_gradient(main_gradient, rng):
    inputs = keras.Input((3,))
    layer = Unused()
    model = RegularizedModel(inputs, keras.layers.Dense(2)(layer(inputs)))
    model.compile(
        # With a gradient of zero, in place of none, the optimizer would decay the weights.
        keras.optimizers.SGD(0.1, weight_decay=0.1),
        "mse",
        regularizer=SubBatchPerturbation(
            num_sub_batches=M, num_perturbed=2, main_gradient=main_gradient
        ),
    )
    before = [numpy(v).copy() for v in model.trainable_variables]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras tells of gradients that do not exist, or does not
        model.train_on_batch(*data(rng))
    changed = [(numpy(v) != b).any() for v, b in zip(model.trainable_variables, before)]
    assert changed == [False, True, True] or BACKEND == "jax"


@pytest.mark.parametrize("value", [0, 5, 1.5, True])
def test_number_is_checked(value):
    with pytest.raises(ValueError, match=r"`num_perturbed` must be an integer from 1 to 4. Recei"):
        SubBatchPerturbation(num_sub_batches=4, num_perturbed=value)


def test_number_is_kept_in_the_configuration():
    regularizer = SubBatchPerturbation(num_sub_batches=6, num_perturbed=3)
    assert regularizers.get(keras.saving.serialize_keras_object(regularizer)).num_perturbed == 3
    assert SubBatchPerturbation().get_config()["num_perturbed"] is None
