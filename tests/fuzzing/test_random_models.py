"""Random models of all Keras layers against brute force, in float64.

    FUZZ_MODELS=1000 FUZZ_FIRST=0 python -m pytest -m "slow or not slow" tests/fuzzing

tries the models of so many seeds instead of the usual ones. A seed's model depends on the backend,
as not all have all layers. A failure prints a `Case` as small as it still fails, which
`check_step(Case(...))` and its like take. What plain Keras cannot train is skipped, with a reason.
"""

import contextlib
import dataclasses
import itertools
import os
import tempfile

import keras
import numpy as np
import pytest
from brute_force import LEARNING_RATE, Reading, flat, rows_of
from frameworks import BACKEND, numpy
from layer_table import EXCLUDED, NAMES, TABLE, names_of_keras
from random_models import EXCLUDED_LOSSES, LOSSES, WITHOUT_SECOND_DERIVATIVES, Case

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness import fisher_trace, gamma_hat
from keras_infomcr.flatness.loss.loss_function import LossFunction
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SubBatchPerturbation

ALPHA, BETA = 0.05, 2.0

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # random models give Keras cause for many
]


def seeds(fast, slow):
    """Return the seeds of a test: few cheap ones, all others marked slow, or the user's choice."""
    if "FUZZ_MODELS" in os.environ:
        first = int(os.environ.get("FUZZ_FIRST", 0))
        return range(first, first + int(os.environ["FUZZ_MODELS"]))
    fast = fast[:1] if BACKEND == "jax" else fast  # which compiles each operation of each shape
    slow = slow[::2] if BACKEND == "torch" else slow  # else CI would take too long
    return [
        *fast,
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in slow if seed not in fast),
    ]


class TellsNothing(Exception):
    """Says why a case cannot be compared: mostly because plain Keras raises an error."""


@contextlib.contextmanager
def plain_keras():
    try:
        yield
    except Exception as error:
        raise TellsNothing(f"plain Keras raises {type(error).__name__}: {error}") from error


def assert_finite(numbers):
    if not np.all(np.isfinite(numbers)):
        raise TellsNothing("NaN or infinity")


def assert_holds(check, case):
    """Run `check(case)`; if it fails, raise an error that names the smallest case that fails."""
    try:
        check(case)
    except TellsNothing as error:
        pytest.skip(str(error))
    except Exception as error:
        kind = type(error)
        smallest = case.smallest(lambda smaller: _raises(kind, check, smaller))
        raise AssertionError(
            f"{check.__name__} fails for seed {case.seed}, and for\n{smallest}"
        ) from error


def _raises(kind, check, case):
    try:
        check(case)
    except Exception as error:
        return type(error) is kind
    return False


def test_every_layer_of_keras_is_listed():
    assert names_of_keras() - set(TABLE) - set(EXCLUDED) == set()


def test_every_loss_of_keras_is_listed():
    names = {name for name, value in vars(keras.losses).items() if isinstance(value, type)}
    assert names - set(LOSSES) - set(EXCLUDED_LOSSES) == set()


# One or two steps


@pytest.mark.parametrize("seed", seeds((1, 8), range(len(NAMES))))
def test_step_is_algorithm_1_and_plain_keras_without_it(seed):
    assert_holds(check_step, Case.of(seed))


def check_step(case):
    """Compare with `Reading`, with `keras.Model` at beta = 0, and with itself saved and loaded."""
    with plain_keras():
        plain = trained(case, keras.Model, None)
    assert_finite(plain.passed)
    ours = trained(case, RegularizedModel, BETA)
    reading = read(case, ours)
    state = [model.non_trainable_variables for model in (ours, reading.model)]
    same(*state, 1e-11 + case.rounding)
    rule = dict(case.rule)
    if rule.get("main_gradient") != "sub_batches":
        # XLA fuses the two programs differently; "auto" may take the mean over sub-batches.
        exact = rule.get("main_gradient") == "full_batch" and case.mode != "xla"
        tolerance = 0 if exact and BACKEND != "jax" else 1e-12 + case.rounding
        unregularized = trained(case, RegularizedModel, 0.0)
        same(unregularized.variables, plain.variables, tolerance)
    if case.seed % 4 == 0:
        check_saved(case, ours)


def check_saved(case, model):
    """Assert that a model saved and loaded takes the same step as the one that was saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        with plain_keras():
            model.save(path)
            loaded = keras.models.load_model(path, safe_mode=False)
    for a, b in zip(loaded.non_trainable_variables, model.non_trainable_variables, strict=True):
        if "seed" in a.path:  # which Keras does not keep for all layers
            a.assign(b)
    step(model, case, 0)
    step(loaded, case, 0)
    same(loaded.variables, model.variables, case.rounding)


def trained(case, base, beta):
    """Return a model after its training steps."""
    model = case.build(base)
    settings = {}
    if beta is not None:
        settings["regularizer"] = SubBatchPerturbation(ALPHA, beta, **dict(case.rule))
    model.compile(**case.compile_arguments(model), **settings)
    model.passed = []
    for k in range(len(case.batch_sizes)):
        step(model, case, k)
        model.passed.append(weights_of(model))
    return model


def step(model, case, k):
    x, y, weights = case.data(model, case.batch_sizes[k])
    if BACKEND == "torch" and k == 0:
        # It may draw from the global generator, as unseeded layers do.
        model._symbolic_build(data_batch=(x, y, weights))
    keras.utils.set_random_seed(k)
    return model.train_on_batch(x, y, weights)


def read(case, ours):
    """Read the steps slowly. If a subset is perturbed, try all and keep the nearest result."""
    rule = dict(case.rule)
    num_perturbed = rule.pop("num_perturbed", None)
    if rule.get("main_gradient") == "auto":
        rule["main_gradient"] = "full_batch"
    model = case.build(keras.Model)
    model.compile(**case.compile_arguments(model))
    reading = Reading(model, ALPHA, BETA, **rule)
    bound = 0.0
    for k, size in enumerate(case.batch_sizes):
        batch = case.data(model, size)
        keras.utils.set_random_seed(k)
        count = min(rule["num_sub_batches"], size)
        ways = itertools.combinations(range(count), min(num_perturbed or count, count))
        start, tries = reading.everything(), []
        for way in ways:
            reading.set_everything(start)
            _, main, extra = reading.step(batch, way)
            assert_finite(weights_of(model))
            distance = np.linalg.norm(ours.passed[k] - weights_of(model))
            tries.append((distance, way, main, extra, reading.everything()))
        distance, _, main, extra, end = min(tries, key=lambda found: found[0])
        reading.set_everything(end)
        effect, moved = (LEARNING_RATE * np.linalg.norm(g) for g in (BETA * extra, main))
        # Each number is rounded by 1e-15 of it, and g_i - h_i may be as small as 1e-6 of g_i.
        bound += 1e-9 * effect + 1e-12 * moved + 1e-14 * np.linalg.norm(weights_of(model))
        bound += LEARNING_RATE * BETA * 10 * reading.error
        bound += case.rounding * (effect + moved)
        assert distance <= bound, (distance, bound, effect, moved)
    return reading


def weights_of(model):
    return flat(map(numpy, model.trainable_variables))


# In half precision


@pytest.mark.parametrize("seed", seeds((1,), range(15)))
def test_regularizer_is_computed_in_float32_whatever_the_policy(seed):
    assert_holds(check_precision, in_less_precision(seed))


def in_less_precision(seed):
    policy = ("float32", "mixed_float16", "mixed_bfloat16")[seed % 3]
    return dataclasses.replace(Case.of(seed), policy=policy, mode="eager")


def check_precision(case):
    """Compare the regulariser's gradient of a model without random layers with that in float64."""
    if case.rounding:
        raise TellsNothing("a layer or the loss computes in float32")
    rule = {k: v for k, v in case.rule if k in ("num_sub_batches", "estimator")}
    keras.config.set_floatx("float32")
    model = case.build(RegularizedModel)
    model.compile(
        **case.compile_arguments(model), regularizer=SubBatchPerturbation(ALPHA, BETA, **rule)
    )
    data = case.data(model, case.batch_sizes[0])
    keras.config.set_floatx("float64")
    if any("seed" in v.path for v in model.non_trainable_variables):
        raise TellsNothing("random numbers depend on the dtype")
    exact = dataclasses.replace(case, policy="float64").build(keras.Model)
    exact.set_weights([numpy(v).astype("float64") for v in model.weights])
    exact.compile(**case.compile_arguments(exact))
    reading = Reading(exact, ALPHA, BETA, **rule)
    with plain_keras():
        _, main, extra = reading.step(in_float64(data))
    assert_finite(extra)
    keras.config.set_floatx("float32")
    batch = Batch(*keras.tree.map_structure(tensor, data))
    found = model.regularizer(Objective(model), Batch(*batch), []).gradient
    keras.config.set_floatx("float64")
    found = flat(
        np.zeros(v.shape) if g is None else numpy(keras.ops.convert_to_tensor(g))
        for g, v in zip(found, model.trainable_variables)
    )
    # A thousand roundings of 6e-8 of the gradients whose difference it is.
    assert np.linalg.norm(found - extra) <= 1e-4 * np.linalg.norm(main) + 10 * reading.error


def tensor(array):
    return None if array is None else keras.ops.convert_to_tensor(array)


def in_float64(data):
    def widened(array):
        return array.astype("float64") if getattr(array, "dtype", None) == "float32" else array

    return keras.tree.map_structure(widened, data)


def same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=tolerance, atol=tolerance)


# Measures


@pytest.mark.parametrize("seed", seeds((1, 8), range(15)))
def test_gamma_hat_and_the_fisher_trace_are_of_the_gradients_of_single_examples(seed):
    assert_holds(check_gamma_hat, Case.of(seed))


NUM_EXAMPLES = 4


def check_gamma_hat(case):
    if case.loss == "CategoricalCrossentropy soft":
        raise TellsNothing("labels count by their largest entry")
    model = measured(case)
    x, y, _ = case.data(model, NUM_EXAMPLES)
    reading = Reading(of_example(measured(case)), training=False)
    singles = [rows_of((x, y, None), slice(i, i + 1)) for i in range(NUM_EXAMPLES)]
    with plain_keras():
        rows = np.array([flat(reading.evaluate(single)[1]) for single in singles])
    assert_finite(rows)
    settings = {"num_examples": NUM_EXAMPLES, "num_trials": 1}
    trace = fisher_trace(model, x, y, **settings).value
    np.testing.assert_allclose(trace, np.mean(np.sum(rows**2, axis=1)), rtol=1e-9, atol=1e-25)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    smallest = np.linalg.svd(rows / np.where(lengths > 0, lengths, 1), compute_uv=False)[-1]
    if smallest < 1e-4:
        return  # ln|J J^T| would be a matter of rounding
    expected = np.linalg.slogdet(rows @ rows.T)[1]
    # See `rounding` in tests/flatness/oracles.py.
    bound = 2 * NUM_EXAMPLES**1.5 * 1e3 * np.finfo("float64").eps / smallest
    assert abs(gamma_hat(model, x, y, **settings).value - expected) <= bound * 100


def of_example(model):
    """Compile a model without label smoothing, which gamma-hat leaves out of a loss."""

    def alone(loss):
        config = loss.get_config()
        if not config.get("label_smoothing"):
            return loss
        return type(loss).from_config({**config, "label_smoothing": 0.0})

    loss = keras.tree.map_structure(alone, model.loss)
    model.compile(loss=loss, run_eagerly=model.run_eagerly)
    return model


def measured(case):
    """Return the model, compiled plainly; three in four run eagerly."""
    case = dataclasses.replace(case, mode=case.mode if case.seed % 4 == 0 else "eager")
    model = case.build(keras.Model)
    model.compile(**case.compile_arguments(model))
    return model


@pytest.mark.parametrize("seed", seeds((1, 8), range(15)))
def test_hessian_vector_products_are_differences_of_gradients(seed):
    assert_holds(check_hessian, Case.of(seed))


def check_hessian(case):
    if case.reduction not in ("sum_over_batch_size", "mean"):
        raise TellsNothing("the loss is no mean over the examples, which is refused")
    if case.rounding:
        raise TellsNothing("a layer or the loss computes in float32")
    if case.loss in WITHOUT_SECOND_DERIVATIVES:
        raise TellsNothing("the loss has no second derivative")
    model = measured(case)
    x, y, _ = case.data(model, NUM_EXAMPLES)
    training = bool(case.seed % 2)
    vector = np.random.default_rng(case.seed).normal(size=model_size(model))
    keras.utils.set_random_seed(0)
    with plain_keras():
        expected, error = Reading(model, training=training).product(vector, (x, y, None))
    assert_finite(expected)
    keras.utils.set_random_seed(0)
    loss = LossFunction(model, training)
    found = loss.hessian_vector_products([(x, y)], loss.point(), vector[None])[0]
    assert np.linalg.norm(found - expected) <= 10 * error + 1e-8 * np.linalg.norm(expected)


def model_size(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)
