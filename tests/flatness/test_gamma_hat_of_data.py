"""gamma-hat of data of any kind and of its trials; it leaves the model and all seeds alone."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array
from keras import layers
from measuring import Batches, Unseeded, dataset, in_batches, measure, numbers_drawn
from nets import NUM_CLASSES, classifier, compiled, from_logits, of_dict_inputs, sequential
from oracles import ln_xi, log_loss_of, rows_of_losses

from keras_infomcr.flatness import GammaHat, gamma_hat


@pytest.fixture
def data(rng):
    return rng.normal(size=(12, 6)), rng.integers(0, NUM_CLASSES, 12)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    "make",
    [
        dataset,
        pytest.param(lambda x, y: dataset(x, y, np.ones(12)), marks=pytest.mark.slow),
        pytest.param(lambda x, y: dataset(x, y).repeat(), marks=pytest.mark.slow),
        lambda x, y: Batches(x, y, 3),
        lambda x, y: Batches(x, y, None),
        lambda x, y: (batch for batch in in_batches(x, y)),
        in_batches,
        lambda x, y: [keras.tree.map_structure(array, b) for b in in_batches(x, y)],
    ],
    ids=["dataset", "weighted", "infinite", "PyDataset", "infinite PyDataset", "generator", "list",
         "tensors"],
)  # fmt: skip
def test_batches_give_what_arrays_give(float64, data, make):
    model = sequential(layers.Dense(NUM_CLASSES))
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    result = gamma_hat(model, make(*data), num_examples=12, num_trials=1)
    assert result.value == pytest.approx(expected, rel=1e-9)


def test_batches_of_dicts(float64, data):
    x, y = {"a": data[0], "b": data[0][::-1]}, data[1]
    model = compiled(of_dict_inputs())
    expected = ln_xi(rows_of_losses(model, x, log_loss_of(y)))
    result = gamma_hat(model, dataset(x, y), num_examples=12, num_trials=1)
    assert result.value == pytest.approx(expected, rel=1e-9)


def test_tensors(float64, data):
    model = sequential(layers.Dense(NUM_CLASSES))
    expected = ln_xi(rows_of_losses(model, data[0], log_loss_of(data[1])))
    assert measure(model, *map(array, data)).value == pytest.approx(expected, rel=1e-9)


def test_only_as_many_batches_are_read_as_examples_are_needed(data):
    read = []

    def batches():
        for i in itertools.count():
            read.append(i)
            yield data[0][4 * i : 4 * i + 4], data[1][4 * i : 4 * i + 4]

    gamma_hat(classifier(), batches(), num_examples=3, num_trials=3)
    assert read == [0, 1, 2]  # 9 examples of the 12


# ---------------------------------------------------------------- trials


def test_trials_share_no_example_until_all_have_been_used(float64, data):
    """Trials of one example tell which example it was."""
    model = classifier()
    each = np.log(np.sum(rows_of_losses(model, data[0], log_loss_of(data[1])) ** 2, axis=1))
    trials = gamma_hat(model, *data, num_examples=1, num_trials=24, seed=0).trials
    used = [int(np.argmin(np.abs(each - value))) for value in trials]
    np.testing.assert_allclose(trials, each[used], rtol=1e-9)
    assert sorted(used[:12]) == sorted(used[12:]) == list(range(12))
    assert used[:12] != used[12:]


def test_trials_of_several_examples_share_none(float64, data):
    x, y = data[0][:7], data[1][:7]
    model = classifier()
    rows = rows_of_losses(model, x, log_loss_of(y))
    pairs = {ln_xi(rows[list(pair)]): pair for pair in itertools.combinations(range(7), 2)}
    trials = gamma_hat(model, x, y, num_examples=2, num_trials=6, seed=0).trials
    used = [next(p for v, p in pairs.items() if v == pytest.approx(t, rel=1e-9)) for t in trials]
    for round_of_three in (used[:3], used[3:]):  # the seventh example waits
        assert len(set(itertools.chain(*round_of_three))) == 6


def test_draws(data):
    """A seed gives the same trials again; none gives new ones whatever the global seeds."""
    model = sequential(layers.Dense(NUM_CLASSES))

    def trials(seed):
        keras.utils.set_random_seed(0)
        return gamma_hat(model, *data, num_examples=4, num_trials=5, seed=seed).trials

    first = trials(1)
    np.testing.assert_array_equal(trials(np.int64(1)), first)
    for seed in (0, None):
        assert not np.allclose(trials(seed), first, rtol=1e-4)
    assert not np.allclose(trials(None), trials(None), rtol=1e-4)


def test_statistics_of_the_trials(data):
    result = gamma_hat(classifier(), *data, num_examples=3, num_trials=7, seed=0)
    assert result.trials.shape == (7,)
    assert result.value == pytest.approx(np.mean(result.trials), rel=1e-14)
    spread = math.sqrt(np.sum((result.trials - result.value) ** 2) / 6)
    assert result.stderr == pytest.approx(spread / math.sqrt(7), rel=1e-12)
    assert result.log_loss_part + result.geometry_part == pytest.approx(result.value, rel=1e-12)
    assert result.log_loss_part < 0


def test_one_trial_has_no_standard_error(data):
    assert math.isnan(measure(classifier(), *data).stderr)


def test_result_is_frozen(data):
    result = measure(classifier(), *data)
    assert isinstance(result, GammaHat)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0


def test_defaults_are_the_papers():
    defaults = gamma_hat.__kwdefaults__
    assert (defaults["num_examples"], defaults["num_trials"]) == (100, 100)
    assert defaults["softmax_scale"] == 0.04
    assert not defaults["normalize_softmax"] and not defaults["training"]


# ---------------------------------------------------------------- nothing is touched


@pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
@pytest.mark.parametrize(
    ("policy", "training"),
    [pytest.param("float32", False, marks=pytest.mark.slow), ("mixed_float16", True)],
)
def test_model_and_seeds_are_untouched(data, training, policy):
    keras.config.set_dtype_policy(policy)
    x, y = data[0].astype("float32"), data[1]
    stack = [layers.Dense(8, kernel_regularizer="l2"), layers.BatchNormalization()]
    stack += [layers.Dropout(0.3), layers.GaussianNoise(0.1)]
    if BACKEND != "jax":  # which refuses it
        stack.append(Unseeded())
    model = sequential(*stack, layers.Dense(NUM_CLASSES))
    model.compile("adam", from_logits(), metrics=["accuracy"])
    model.fit(x, y, verbose=0)

    def state():
        variables = model.variables + model.optimizer.variables + model.metrics_variables
        return [v.numpy() for v in variables], [x.dtype_policy.name for x in model.layers]

    before = state()
    arrays = x.copy(), y.copy()
    keras.utils.set_random_seed(1)
    numbers_drawn()  # makes the global generator, which takes its seed from Python's
    expected = numbers_drawn()
    keras.utils.set_random_seed(1)
    numbers_drawn()
    gamma_hat(model, x, y, num_examples=6, num_trials=2, training=training, chunk_size=3)
    drawn = numbers_drawn()
    np.testing.assert_equal(drawn, expected)
    np.testing.assert_equal(state(), before)
    np.testing.assert_equal((x, y), arrays)
    assert model.losses  # the penalties are back
    assert keras.config.dtype_policy().name == policy


@pytest.mark.slow
def test_next_training_step_is_the_same_after_measuring(data):
    x, y = data[0].astype("float32"), data[1]
    weights = []
    for measured in (False, True):
        keras.utils.set_random_seed(3)
        model = sequential(layers.Dense(8), layers.Dropout(0.5), layers.Dense(NUM_CLASSES))
        model.fit(x, y, batch_size=4, verbose=0)
        if measured:
            measure(model, x, y)
            # In another order other examples lose units, and the model may not fit them.
            measure(model, x, y, training=True, seed=0)
        model.fit(x, y, batch_size=4, verbose=0)
        weights.append(model.get_weights())
    np.testing.assert_equal(*weights)
