"""Small networks that callbacks measure as they train."""

import math

import keras
from frameworks import tensorflow
from keras import layers

NUM_CLASSES = 4


DRAW = {"num_examples": 5, "num_trials": 2}


NAN = math.nan


def compiled(model, optimizer="sgd", **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **kwargs)
    return model


def classifier(optimizer="sgd", stack=()):
    last = layers.Dense(NUM_CLASSES)
    return compiled(keras.Sequential([keras.Input((6,)), *stack, last]), optimizer)


def unchanging():
    return classifier(keras.optimizers.SGD(0.0))


class Stop(keras.callbacks.Callback):
    """Stops training at the end of an epoch, or within one."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.epoch, self.batch, self.now = epoch, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch and batch == self.batch:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.batch is None:
            self.model.stop_training = True


def dataset(x, y):
    return tensorflow().data.Dataset.from_tensor_slices((x, y))
