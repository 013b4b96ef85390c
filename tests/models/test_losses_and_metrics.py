"""Losses, metrics, weights of examples and penalties train as in Keras and as in Algorithm 1."""

import keras
import pytest
from frameworks import BACKEND
from literal_reading import check_training
from small_nets import (
    EAGER,
    HEADS,
    LABELS,
    WEIGHTS,
    ActivityLoss,
    X,
    Y,
    classifier,
    compiling,
    fitting,
    two_heads,
    two_layers,
    with_main_gradient,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.slow
@with_main_gradient
def test_losses_and_metrics_per_output(main, mode):
    labels = {"a": LABELS, "b": Y}
    fit = fitting(y=labels, validation_data=(X[:6], {"a": LABELS[:6], "b": Y[:6]}))
    ours = check_training(two_heads, fit, compiling(**mode, **HEADS), main)
    logs = ours.fit(X, labels, verbose=0).history
    assert {"loss", "a_loss", "b_loss", "a_accuracy", "b_mae", "infomcr_reg"} == set(logs)


@pytest.mark.slow
def test_loss_weights():
    loss_weights = {"a": 0.25, "b": 3.0}
    compile = compiling(**EAGER, **HEADS, loss_weights=loss_weights)
    check_training(two_heads, fitting(y={"a": LABELS, "b": Y}), compile, "auto")


@pytest.mark.parametrize(
    ("main", "mode"),
    [pytest.param("full_batch", EAGER, marks=pytest.mark.slow), ("auto", {})],
    ids=["full_batch", "auto"],
)
def test_weighted_metrics_and_sample_weight(main, mode):
    compile = compiling(**mode, metrics=["mae"], weighted_metrics=["mse"])
    check_training(two_layers, fitting(sample_weight=WEIGHTS), compile, main)


@pytest.mark.slow
def test_sample_weight_per_output():
    weights = {"a": WEIGHTS, "b": WEIGHTS[::-1].copy()}
    fit = fitting(y={"a": LABELS, "b": Y}, sample_weight=weights)
    check_training(two_heads, fit, compiling(**EAGER, **HEADS), "auto")


def test_class_weight():
    fit = fitting(y=LABELS, class_weight={0: 0.5, 1: 2.0, 2: 4.0})
    check_training(
        classifier, fit, compiling(**EAGER, loss="sparse_categorical_crossentropy"), "auto"
    )


@pytest.mark.parametrize(
    "reduction", [pytest.param("sum", marks=pytest.mark.slow), "mean_with_sample_weight"]
)
def test_reduction_of_the_loss(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    check_training(
        two_layers, fitting(sample_weight=WEIGHTS), compiling(**EAGER, loss=loss), "auto", 1e-15
    )


def test_add_loss():
    def build(base):
        inputs = keras.Input((4,))
        hidden = ActivityLoss()(keras.layers.Dense(3, "tanh")(inputs))
        return base(inputs, keras.layers.Dense(2)(hidden))

    check_training(build, fitting(), compiling())


@pytest.mark.parametrize(
    "main", [pytest.param("full_batch", marks=pytest.mark.slow), "sub_batches"]
)
def test_training_by_add_loss_alone(main):
    def build(base):
        inputs = keras.Input((4,))
        return base(inputs, ActivityLoss()(keras.layers.Dense(3)(inputs)))

    check_training(build, fitting(y=None), compiling(loss=None), main)


def test_activity_penalty():
    check_training(
        lambda base: two_layers(base, activity_regularizer="l2"), fitting(), compiling(**EAGER)
    )


@pytest.mark.parametrize(
    ("main", "mode"),
    [("full_batch", EAGER), pytest.param("auto", {}, marks=pytest.mark.slow)],
    ids=["full_batch", "auto"],
)
def test_weight_penalties(main, mode):
    penalties = {
        "kernel_regularizer": keras.regularizers.L1L2(1 / 64, 1 / 32),
        "bias_regularizer": keras.regularizers.L2(1 / 16),
    }
    check_training(lambda base: two_layers(base, **penalties), fitting(), compiling(**mode), main)


def test_overridden_compute_loss():
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                loss = super().compute_loss(x, y, y_pred, sample_weight, training)
                return loss + keras.ops.mean(y_pred**4) * (1 if training else 100)

        return two_layers(Net, kernel_regularizer=keras.regularizers.L2(1 / 32))

    check_training(build, fitting(sample_weight=WEIGHTS), compiling(**EAGER))


def test_overridden_compute_loss_without_training():
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                return keras.ops.mean((y - y_pred) ** 4) + sum(self.losses)

        return two_layers(Net, kernel_regularizer=keras.regularizers.L2(1 / 32))

    check_training(build, fitting(), compiling(**EAGER, loss=None))


@pytest.mark.parametrize(
    "main", ["full_batch", pytest.param("sub_batches", marks=pytest.mark.slow)]
)
def test_metrics_updated_in_compute_loss(main):
    def build(base):
        class Net(base):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                self.largest.update_state(keras.ops.abs(y_pred))
                return keras.ops.mean((y - y_pred) ** 4)

        model = two_layers(Net)
        model.largest = keras.metrics.Mean(name="largest")
        return model

    check_training(build, fitting(), compiling(**EAGER, loss=None), main)


def test_overridden_compute_metrics():
    def build(base):
        class Net(base):
            def compute_metrics(self, x, y, y_pred, sample_weight=None):
                logs = super().compute_metrics(x, y, y_pred, sample_weight)
                return {**logs, "largest": keras.ops.max(y_pred)}

        return two_layers(Net)

    ours = check_training(build, fitting(), compiling(**EAGER, metrics=["mae"]))
    assert set(ours.fit(X, Y, verbose=0).history) == {"loss", "mae", "largest", "infomcr_reg"}


@pytest.mark.slow
def test_overridden_train_step_that_calls_the_inherited_one():
    def build(base):
        class Net(base):
            def train_step(self, *args):
                returned = super().train_step(*args)
                if BACKEND == "jax":
                    return {**returned[0], "one": 1.0}, returned[1]
                return {**returned, "one": 1.0}

        return two_layers(Net)

    check_training(build, fitting(), compiling(**EAGER))
