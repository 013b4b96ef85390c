import keras
import numpy as np
import pytest
from frameworks import array, assert_allclose

from keras_infomcr import RegularizedModel
from keras_infomcr.flatness import gamma_hat

keras_cv = pytest.importorskip("keras_cv", reason="the extra cv is not installed")


@pytest.mark.slow
def test_image_classifier_trains_saves_and_loads(tmp_path, rng):
    backbone = keras_cv.models.ResNetBackbone(
        stackwise_filters=[64],
        stackwise_blocks=[1],
        stackwise_strides=[1],
        include_rescaling=False,
        block_type="basic_block",
        input_shape=(16, 16, 3),
    )
    classifier = keras_cv.models.ImageClassifier(backbone, num_classes=4, activation=None)
    model = RegularizedModel.from_model(classifier)
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer="sub_batch_perturbation",
    )
    x, y = rng.normal(size=(32, 16, 16, 3)).astype("float32"), np.arange(32) % 4
    before = [np.copy(w) for w in classifier.get_weights()]
    history = model.fit(x, y, batch_size=16, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert min(history["infomcr_reg"]) > 0
    assert any((a != b).any() for a, b in zip(before, classifier.get_weights()))

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    # The same program on the same numbers; frameworks may add in another order.
    assert_allclose(loaded(array(x)), classifier(array(x)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(gamma_hat(loaded, x, y, num_examples=8, num_trials=2).value)
    loaded.fit(x, y, batch_size=16, verbose=0)
