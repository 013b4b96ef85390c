"""The log of what a regulariser adds, in norms of the training gradient."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, only_on

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SharpnessAware, Step, SubBatchPerturbation
from keras_infomcr.regularizers.regularizer import Regularizer

EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}


def linear(rule, penalty=0.0, **kwargs):
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(2, use_bias=False, kernel_regularizer=keras.regularizers.L2(penalty))
    model = RegularizedModel(inputs, dense(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", regularizer=rule, **kwargs)
    model.set_weights([np.arange(6.0).reshape(3, 2)])
    return model


def expected(x, y, penalty, share):
    """Return ||share (grad L(w + eps) - g)|| / ||g + penalty||, eps of norm 0.1 along g."""
    w = np.arange(6.0).reshape(3, 2)
    g, h = np.zeros(6), 2 / (2 * len(x)) * np.kron(x.T @ x, np.eye(2))
    g = h @ w.ravel() - (x.T @ y).ravel() * 2 / (2 * len(x))
    added = share * h @ (0.1 * g / np.linalg.norm(g))
    return np.linalg.norm(added) / np.linalg.norm(g + 2 * penalty * w.ravel())


KEY = "sharpness_aware_relative_norm"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_norm_that_sam_adds(share, rng, float64):
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    model = linear(SharpnessAware(0.1, share), 0.125, log_regularizer_norm=True, **EAGER)
    history = model.fit(x, y, batch_size=8, epochs=1, verbose=0).history
    assert history[KEY] == pytest.approx([expected(x, y, 0.125, share)], rel=1e-12)


def test_the_norm_that_sub_batches_add(rng, float64):
    """With one slice and a step along -g of length 0.1 the difference is SAM's."""
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    g = np.linalg.norm(2 / 16 * x.T @ (x @ np.arange(6.0).reshape(3, 2) - y))
    for main in ("full_batch", "sub_batches"):
        rule = SubBatchPerturbation(0.1 / g, 1.0, 1, main)
        model = linear(rule, 0.125, log_regularizer_norm=True, **EAGER)
        history = model.fit(x, y, batch_size=8, epochs=1, verbose=0).history
        found = history["infomcr_reg_relative_norm"]
        assert found == pytest.approx([expected(x, y, 0.125, 1.0)], rel=1e-12)


@only_on("tensorflow", reason="`MirroredStrategy` is TensorFlow's")
def test_replicas_add_what_one_device_adds(mirrored, rng, float64):
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    with mirrored.scope():
        model = linear(SharpnessAware(0.1), log_regularizer_norm=True)
    history = model.fit(x, y, batch_size=8, epochs=1, verbose=0).history
    assert history[KEY] == pytest.approx([expected(x, y, 0.0, 1.0)], rel=1e-12)


def test_it_is_logged_on_request_alone_and_comes_back_from_a_file(rng, tmp_path):
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    model = linear(SharpnessAware(), **EAGER)
    assert KEY not in model.fit(x, y, verbose=0).history
    model = linear(SharpnessAware(), log_regularizer_norm=True, **EAGER)
    model.regularizer_active = False
    assert np.isnan(model.fit(x, y, verbose=0).history[KEY]).all()
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    again.regularizer_active = True
    assert np.isfinite(again.fit(x, y, verbose=0).history[KEY]).all()
    with pytest.raises(ValueError, match="`log_regularizer_norm` must be `True` or `False`"):
        linear(SharpnessAware(), log_regularizer_norm=1)


def test_a_rule_without_the_training_gradient_has_no_such_norm(rng):
    class Elsewhere(Regularizer):
        def replaces_main_pass(self, model):
            return True

        def __call__(self, objective, batch, memory):
            main = objective.evaluate(objective.weights(), objective.state(), batch)
            return Step(main.loss, main=main)

        def get_config(self):
            return {"strength": 1.0}

    model = linear(Elsewhere(1.0), log_regularizer_norm=True, **EAGER)
    with pytest.raises(ValueError, match=r"evaluates the training gradient.*Received: Elsewhere"):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 2)))
