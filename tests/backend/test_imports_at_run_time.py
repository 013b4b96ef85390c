"""Each backend works where the other frameworks cannot be imported."""

import subprocess
import sys

import pytest
from frameworks import BACKEND

PROGRAM = """
import importlib.abc
import importlib.machinery
import sys


class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in {others}:
            return importlib.machinery.ModuleSpec(name, self, origin="refused")

    def exec_module(self, module):
        raise ImportError(module.__name__)


sys.meta_path.insert(0, Refuse())

import keras
import numpy as np
from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop

inputs = keras.Input((4,))
model = RegularizedModel(inputs, keras.layers.Dense(3)(inputs))
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
data = np.ones((8, 4)) + np.arange(8)[:, None], np.arange(8) % 3
callbacks = [GammaHatCallback(data, num_examples=2), StartRegAfterLRDrop(start_epoch=0)]
logs = model.fit(*data, batch_size=8, callbacks=callbacks, verbose=0).history
assert not set(sys.modules) & set({others})
assert {{"loss", "infomcr_reg", "gamma_hat", "gamma_hat_stderr"}} <= set(logs), logs
"""


@pytest.mark.slow
def test_no_other_framework_is_imported():
    others = {"tensorflow", "jax", "torch"} - {BACKEND}
    if BACKEND == "tensorflow":  # Keras imports what it finds there
        others = set()
    subprocess.run([sys.executable, "-c", PROGRAM.format(others=sorted(others))], check=True)
