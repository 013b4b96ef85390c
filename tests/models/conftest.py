import keras
import pytest
from keras.src.models.functional import Functional

from keras_infomcr import RegularizedModel
from keras_infomcr.models.regularized_model import RegularizedFunctional
from keras_infomcr.models.regularized_training import RegularizedTraining


@pytest.fixture(autouse=True)
def bases_stay():
    """Assert that no test has changed the bases of our classes, as Keras does with its users'."""
    yield
    assert RegularizedModel.__bases__ == (RegularizedTraining, keras.Model)
    assert RegularizedFunctional.__bases__ == (RegularizedModel, Functional)
    assert not issubclass(RegularizedModel, Functional)
