"""Train on all GPUs of this machine, and show that the losses are the same as on one device.

    python examples/distributed_mirrored.py

Under `tf.distribute.MirroredStrategy` each replica takes its share of every batch and of its
sub-batches, and the weights move as they would on one device. Where there are no GPUs, two logical
CPU devices stand in for them. The network, trained on scikit-learn's digits, normalises each batch
over all replicas. You will see the losses of each epoch side by side, and by how much they differ.
"""

import argparse
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from images import digits
from keras import layers
from options import positive, use_true_float32

from keras_infomcr import RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

SUB_BATCHES_A_REPLICA, EXAMPLES_A_REPLICA = 4, 64


def make_strategy():
    """Return a strategy over all GPUs, or over two CPU devices."""
    if gpus := tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(gpus))])
    [cpu] = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, parts)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def make_model():
    """Return the network, not compiled."""
    inputs = x = keras.Input((8, 8, 1))
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(synchronized=True)(x)
        x = layers.Activation("gelu")(x)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return RegularizedModel(inputs, outputs)


def train(strategy, num_replicas, epochs):
    """Return the training loss of each epoch, and the regulariser's value."""
    x, y = digits(seed=0)
    batch_size = EXAMPLES_A_REPLICA * num_replicas
    # Keras's own update depends on the number of replicas where that does not divide the batch, so
    # the digits that would make a smaller last batch are left out.
    x, y = (a[: len(a) // batch_size * batch_size] for a in (x, y))
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = make_model()
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # All replicas take equally many, so their number must divide this one.
            regularizer=SubBatchPerturbation(
                alpha=0.01, beta=1.0, num_sub_batches=SUB_BATCHES_A_REPLICA * num_replicas
            ),
        )
    drop = keras.callbacks.LearningRateScheduler(lambda e: 0.1 if e < epochs // 2 else 0.02)
    callbacks = [drop, StartRegAfterLRDrop()]
    # The batch is shared among all replicas.
    fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **fit).history


def main():
    """Train on all devices and on one, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help = "passes over the digits; the learning rate falls after half of them (%(default)s)"
    parser.add_argument("--epochs", type=positive, default=10, help=help)
    epochs = parser.parse_args().epochs
    use_true_float32()
    strategy = make_strategy()
    replicas = strategy.num_replicas_in_sync
    print(f"{replicas} devices: {', '.join(strategy.extended.worker_devices)}")
    one_device = tf.distribute.OneDeviceStrategy(strategy.extended.worker_devices[0])
    histories = [train(s, replicas, epochs) for s in (strategy, one_device)]
    print(f"{'epoch':>5} {'loss':>10} {'on one':>10} {'infomcr_reg':>12} {'on one':>10}")
    columns = zip(*(h[key] for key in ("loss", "infomcr_reg") for h in histories))
    for epoch, (loss, loss_one, value, value_one) in enumerate(columns, 1):
        print(f"{epoch:5} {loss:10.6f} {loss_one:10.6f} {value:12.3e} {value_one:10.3e}")
    losses, losses_of_one = (np.array(h["loss"]) for h in histories)
    difference = np.max(np.abs(losses / losses_of_one - 1))
    print(f"The loss curves differ by at most {difference:.1e} of the loss.")
    # Sums in another order round the weights by 1e-7 a step, which training amplifies.
    return 0 if difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
