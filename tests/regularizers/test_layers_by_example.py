"""The mean over sub-batches is the training gradient, wherever it is taken for it."""

import keras
import numpy as np
import pytest
from frameworks import gradients, numpy
from layer_cases import UNKNOWN, examples, known_cases
