"""All kinds of data that Keras takes give the same logs as arrays do, to the bit."""

import keras
import numpy as np
import pytest
from frameworks import tensorflow
from parameters import slow_but

from keras_infomcr import GammaHatCallback, RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.arange(12) % 3


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[5 * i : 5 * i + 5], Y[5 * i : 5 * i + 5]


def dataset():
    return tensorflow().data.Dataset.from_tensor_slices((X, Y)).batch(5)


def data_loader():
    torch = pytest.importorskip("torch")
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(tensors, batch_size=5)


def train(data, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, "tanh")(inputs)
    model = RegularizedModel(inputs, keras.layers.Dense(3)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, regularizer=SubBatchPerturbation(0.1, 5.0, 2))
    callback = GammaHatCallback(data, num_examples=4, num_trials=3)
    return model.fit(epochs=2, shuffle=False, verbose=0, callbacks=[callback], **kwargs).history


@pytest.mark.parametrize("make", slow_but([Batches, dataset, data_loader], dataset))
def test_data_of_any_kind(make):
    data = make()
    logs = train(data, x=data)
    assert set(logs) == {
        "loss",
        "infomcr_reg",
        "gamma_hat",
        "gamma_hat_stderr",
        "gamma_hat_log_loss_part",
    }
    np.testing.assert_equal(logs, train((X, Y), x=X, y=Y, batch_size=5))
