"""Train 20 regularised steps and measure gamma-hat from fixed weights and data; save the numbers.

    KERAS_BACKEND=jax python train_and_measure.py numbers.npz

`test_numbers_on_every_backend.py` runs it on each backend.
"""

import sys

import keras
import numpy as np

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness import gamma_hat
from keras_infomcr.regularizers import SubBatchPerturbation

rng = np.random.default_rng(0)
LABELS = rng.integers(0, 4, size=58)
IMAGES = (rng.normal(size=(58, 8, 8, 3)) + LABELS[:, None, None, None] / 4).astype("float32")
SAMPLE_WEIGHT = rng.uniform(0.5, 2, size=58).astype("float32")


def network():
    """Return a model with batch norm, layer norm and L2, whose weights NumPy has drawn."""
    penalty = keras.regularizers.L2(1e-3)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, use_bias=False, kernel_regularizer=penalty)(inputs)
    x = keras.layers.Activation("gelu")(keras.layers.BatchNormalization()(x))
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.LayerNormalization()(keras.layers.Flatten()(x))
    outputs = keras.layers.Dense(4, kernel_regularizer=penalty)(x)
    model = RegularizedModel(inputs, outputs)
    draw = np.random.default_rng(1)
    for variable in model.trainable_variables:
        around = 1.0 if "gamma" in variable.path else 0.0
        variable.assign(around + 0.1 * draw.normal(size=variable.shape))
    return model


def train_and_measure(estimator):
    """Return the numbers of one run: 5 epochs of 3 batches of 16 and a last one of 10 examples."""
    model = network()
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        regularizer=SubBatchPerturbation(1e-2, 5.0, 4, estimator=estimator),
    )
    data = {"x": IMAGES, "y": LABELS}
    before = gamma_hat(model, **data, num_examples=20, num_trials=5, seed=0)
    logs = model.fit(
        **data, batch_size=16, epochs=5, shuffle=False, sample_weight=SAMPLE_WEIGHT, verbose=0
    ).history
    gamma = gamma_hat(model, **data, num_examples=20, num_trials=5, seed=0)
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    numbers = {
        "weights": weights,
        "gamma_hat before": before.value,
        "gamma_hat": gamma.value,
        "stderr": gamma.stderr,
        **logs,
    }
    return {f"{estimator}/{name}": value for name, value in numbers.items()}


if __name__ == "__main__":
    runs = map(train_and_measure, ("finite_difference", "hessian_vector_product"))
    np.savez(sys.argv[1], **{name: value for run in runs for name, value in run.items()})
