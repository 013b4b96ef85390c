"""One of the processes that train a model together, or all of them in one.

`python worker.py options` trains as `options`, a dictionary in JSON, say; see `train`.
"""

import functools
import json
import os
import signal
import sys
import warnings

import keras
import numpy as np
from frameworks import BACKEND, float64_everywhere

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.callbacks import FlatnessCallback, RegularizationSchedule
from keras_infomcr.flatness import adaptive_sharpness, fisher_trace, hessian_trace, local_energy
from keras_infomcr.regularizers import SubBatchPerturbation

EPOCHS = 4
MEASURES = [
    functools.partial(hessian_trace, num_products=6, seed=0),
    functools.partial(local_energy, num_samples=2, seed=0),
    functools.partial(adaptive_sharpness, num_steps=2, seed=0),
    functools.partial(fisher_trace, num_examples=8, num_trials=2, seed=0),
    "input_jacobian_norm",
]


def data():
    draw = np.random.default_rng(0)
    return draw.normal(size=(24, 4)), draw.normal(size=(24, 2))


class Model(RegularizedModel):
    """A model whose step logs something more."""

    def train_step(self, *args):
        result = super().train_step(*args)
        logs = result[0] if BACKEND == "jax" else result
        logs["twice"] = 2 * logs["mae"]
        return result


class Errors(keras.metrics.Metric):
    """The mean absolute error of each output: a metric that is no scalar."""

    def __init__(self):
        super().__init__()
        self.total = self.add_variable((2,), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        errors = keras.ops.abs(y_true - y_pred)
        self.total.assign_add(keras.ops.sum(errors, axis=0))
        self.count.assign_add(keras.ops.cast(keras.ops.shape(errors)[0], self.count.dtype))

    def result(self):
        return self.total / self.count


class Scaled(keras.losses.Loss):
    """The mean squared error times a variable, which is none of the model's."""

    def __init__(self):
        super().__init__()
        self.factor = keras.Variable(1.0)

    def call(self, y_true, y_pred):
        return self.factor * keras.losses.mean_squared_error(y_true, y_pred)


def build(synchronized):
    keras.utils.set_random_seed(0)
    penalty = keras.regularizers.L2(1 / 64)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, "tanh", kernel_regularizer=penalty)(inputs)
    if synchronized:  # on JAX it always is
        x = keras.layers.BatchNormalization(synchronized=BACKEND == "tensorflow")(x)
    model = Model(inputs, keras.layers.Dense(2)(x))
    optimizer = keras.optimizers.SGD(1 / 8, momentum=0.5)
    regularizer = SubBatchPerturbation(0.05, 1.0, 4)
    model.compile(optimizer, Scaled(), metrics=["mae", Errors()], regularizer=regularizer)
    return model


class Lower(keras.callbacks.Callback):
    """Lower the learning rate, which opens the gate; kill the process where one might die."""

    def __init__(self, killed_at):
        super().__init__()
        self.killed_at = killed_at

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 1 / 8 if epoch < 1 else 1 / 16

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, index=0, synchronized=False, killed_at=None):
    """Train for `EPOCHS` epochs, resuming what the folder holds.

    Args:
        folder: Path that all processes share.
        index: Integer, which of the processes this is.
        synchronized: Boolean, whether there is a layer of batch normalisation.
        killed_at: Integer or `None`, the step before which this process dies.

    Returns:
        Dictionary of arrays: the weights after `fit`, its logs, what `evaluate` gives.
    """
    import tensorflow as tf

    warnings.filterwarnings("ignore", "The loss is no cross-entropy", UserWarning)
    x, y = data()
    strategy = tf.distribute.get_strategy()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = build(synchronized)
    policy = tf.data.Options()
    policy.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).with_options(policy)
    backup = f"{folder}/backup"
    os.makedirs(backup, exist_ok=True)  # else both workers would, and one fail
    callbacks = [
        Lower(killed_at),
        StartRegAfterLRDrop(),
        RegularizationSchedule(lambda epoch: 2.0**epoch),
        GammaHatCallback((x, y), num_examples=8, num_trials=2),
        FlatnessCallback((x, y), MEASURES),
        keras.callbacks.BackupAndRestore(backup, delete_checkpoint=False),
    ]
    fit = {"validation_data": batches, "shuffle": False, "verbose": 0}
    logs = model.fit(batches, epochs=EPOCHS, callbacks=callbacks, **fit).history
    model.save_weights(f"{folder}/{index}.weights.h5")
    model.save(f"{folder}/{index}.keras")
    result = {f"weight{i}": w for i, w in enumerate(model.get_weights())}
    found = model.evaluate(batches, verbose=0)
    if BACKEND == "tensorflow":  # Keras on JAX cannot, with several processes
        result["predicted"] = model.predict(batches, verbose=0)
    return result | logs | {"evaluated": np.concatenate([np.ravel(value) for value in found])}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", 2)
        addresses = ",".join(options.pop("addresses"))
        keras.distribution.initialize(addresses, 2, options["index"])
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    with float64_everywhere():
        np.savez(f"{options['folder']}/{options['index']}.npz", **train(**options))
