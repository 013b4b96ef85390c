"""Whatever has a state advances once a step, as in Keras."""

import functools

import keras
import pytest
from frameworks import only_on
from literal_reading import ALPHA, BETA, assert_same, check_training, trained
from small_nets import (
    EAGER,
    QUICKEST,
    SIZE,
    Measured,
    X,
    Y,
    compiling,
    fitting,
    normalized,
    sgd,
    two_layers,
)

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.slow
def test_state_advances_once_per_step():
    """The state is: batch-norm statistics, seeds, metrics of layers and of the model."""
    check_training(normalized, fitting(), compiling(metrics=["mae"]))


FAST = [("full_batch", 1, "eager"), ("sub_batches", 1, "graph")]
STEPS = [
    pytest.param(
        *case[:2], mode, id="-".join(map(str, case)), marks=[pytest.mark.slow] * (case not in FAST)
    )
    for main in ("full_batch", "sub_batches")
    for num_perturbed in (None, 1)
    for name, mode in (("eager", EAGER), ("graph", {}))
    for case in [(main, num_perturbed, name)]
]


@pytest.mark.parametrize(("main", "num_perturbed", "mode"), STEPS)
def test_seeds_advance_once_per_step_whatever_the_main_gradient(main, num_perturbed, mode):
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2, main, num_perturbed)
    compile = compiling(**mode)
    ours, _ = trained(RegularizedModel, normalized, fitting(), compile, regularizer=regularizer)
    assert_same(seeds_of(ours), seeds_after_training_by_plain_keras())


@functools.cache
def seeds_after_training_by_plain_keras():
    """Return the seeds, which are integers that no dtype or compiler changes."""
    plain, _ = trained(keras.Model, normalized, fitting(), compiling(**QUICKEST))
    assert len(seeds_of(plain)) == 2
    return seeds_of(plain)


def seeds_of(model):
    return [v.numpy() for v in model.non_trainable_variables if "seed" in v.path]


@only_on("tensorflow", "torch", reason="On JAX, Keras cannot update the metrics of a layer.")
def test_metrics_of_layers_count_each_example_once_whatever_beta():
    model = normalized(RegularizedModel)
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2)
    model.compile(sgd(), "mse", regularizer=regularizer, **QUICKEST)
    model.fit(X, Y, 5, verbose=0)
    metrics = [layer.mean for layer in model.layers if isinstance(layer, Measured)]
    assert [float(metric.count.value) for metric in metrics] == [SIZE]


@pytest.mark.parametrize("main", ["full_batch", "auto", "sub_batches"])
def test_metrics_count_each_example_once(main):
    model = two_layers(RegularizedModel)
    regularizer = SubBatchPerturbation(ALPHA, BETA, 2, main)
    metric = keras.metrics.MeanSquaredError()
    model.compile(sgd(), "mse", metrics=[metric], regularizer=regularizer, **QUICKEST)
    model.fit(X, Y, 5, verbose=0)
    assert float(metric.count.value) == SIZE
