"""Features of Keras's optimizers train as in Keras and as in Algorithm 1."""

import keras
import pytest
from frameworks import BACKEND
from literal_reading import check_training
from small_nets import EAGER, compiling, fitting, sgd, two_layers

pytestmark = pytest.mark.usefixtures("float64")

OPTIMIZERS = {
    "momentum": lambda: sgd(momentum=1 / 2),
    "EMA": lambda: sgd(use_ema=True, ema_momentum=0.75),
    "gradient accumulation": lambda: sgd(gradient_accumulation_steps=2),
    "clipnorm": lambda: sgd(clipnorm=1 / 8),
    "global_clipnorm": lambda: sgd(global_clipnorm=1 / 8),
    "clipvalue": lambda: sgd(clipvalue=1 / 16),
    "weight decay": lambda: keras.optimizers.AdamW(1 / 64),
    "loss scale": lambda: sgd(loss_scale_factor=1024.0),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.PiecewiseConstantDecay([1], [1 / 8, 1 / 16])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer(optimizer):
    check_training(two_layers, fitting(), compiling(optimizer, **EAGER))


@pytest.mark.slow
def test_optimizer_in_a_graph():
    def optimizer():
        # On JAX Keras cannot call `fit` twice with EMA: it donates a buffer to itself.
        use_ema = BACKEND != "jax"
        return sgd(use_ema=use_ema, gradient_accumulation_steps=2, clipnorm=1 / 8)

    check_training(two_layers, fitting(), compiling(optimizer))


def test_weight_constraints():
    constraint = keras.constraints.MaxNorm(1 / 2)
    check_training(
        lambda base: two_layers(base, kernel_constraint=constraint), fitting(), compiling(**EAGER)
    )
