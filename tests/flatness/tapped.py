"""Networks measured by the Gram matrices of their layers, and what must come out."""

import keras
import numpy as np
from frameworks import jacobian, numpy
from keras import layers, ops
from nets import NUM_CLASSES, sequential
from oracles import ln_xi

from keras_infomcr.flatness.per_example.gamma_hat_estimator import GammaHatEstimator
from keras_infomcr.flatness.per_example.trial_settings import TrialSettings


def log_odds(model, x, y):
    """Return m_i of each example, evaluated alone."""
    outputs = ops.concatenate([model(x[i : i + 1]) for i in range(len(x))])
    true = ops.cast(ops.one_hot(y, NUM_CLASSES), outputs.dtype)
    others = ops.where(true > 0, -np.inf, outputs)
    return ops.sum(true * outputs, axis=-1) - ops.logsumexp(others, axis=-1)


def expected_by_layer(model, x, y):
    """Return ln|xi| of the weights of each layer."""
    weights = model.trainable_variables
    rows = jacobian(lambda: log_odds(model, x, y), weights)
    parts = np.split(rows, np.cumsum([np.prod(v.shape, dtype=int) for v in weights])[:-1], axis=1)
    by_layer = {}
    for v, part in zip(weights, parts):
        by_layer.setdefault(v.path.rpartition("/")[0], []).append(part)
    log_loss = -2 * np.sum(np.logaddexp(0, numpy(log_odds(model, x, y))))
    joined = (np.concatenate(parts, axis=1) for parts in by_layer.values())
    return [-np.inf if r.shape[1] < len(x) else log_loss + ln_xi(r) for r in joined]


class Tokens(layers.Layer):
    """Makes integers of real numbers."""

    def __init__(self, count=7):
        super().__init__()
        self.count = count

    def call(self, inputs):
        return ops.cast(ops.floor(ops.abs(50 * inputs)), "int32") % self.count

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, "int32")


def made(stack):
    model = sequential(*stack, layers.Activation("tanh"), layers.Flatten(),
                       layers.Dense(NUM_CLASSES), inputs=(60,))  # fmt: skip
    rng = np.random.default_rng(1)
    for v in model.variables:  # moving variances too must be positive
        if "kernel" in v.path:
            v.assign(rng.normal(size=v.shape) * 1.5 / np.sqrt(np.prod(v.shape[:-1])))
        elif "seed" not in v.path:
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


def estimator_of(model, data):
    settings = TrialSettings(
        num_examples=4,
        num_trials=1,
        training=False,
        chunk_size=None,
        normalize_softmax=False,
        softmax_scale=0.04,
        seed=None,
    )
    return GammaHatEstimator(model, *data, settings)
