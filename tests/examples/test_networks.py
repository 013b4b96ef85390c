import keras
import numpy as np
import pytest
from frameworks import array, assert_allclose, numpy
from networks import (
    NETWORKS,
    densenet_bc_100_12,
    layers,
    plain_cnn,
    resnet_20,
    wrn_18_1_5,
    wrn_28_2,
    wrn_28_2_infomcr,
)
from networks.wide_resnet import wide_resnet

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

# Millions of weights, as the papers have them; the plain network is ours.
MILLIONS = {
    "plain-cnn": "0.29",
    "resnet-20": "0.27",
    "wrn-28-2": "1.47",
    "wrn-28-2-infomcr": "1.47",
    "wrn-28-10": "36.48",
    "densenet-bc-100-12": "0.77",
    "wrn-18-1.5": "25.88",
}

# A unit of batch normalisation that has seen no data divides by the root of 1 + epsilon.
FRESH = np.sqrt(1 + 1e-5)

pytestmark = pytest.mark.slow


def weight_count(network):
    return sum(np.prod(v.shape) for v in keras.Model(*network()).trainable_variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_number_of_weights_is_that_of_the_paper(name):
    assert f"{weight_count(NETWORKS[name]) / 1e6:.2f}" == MILLIONS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_functions_take_the_size_of_images_and_the_number_of_classes(name):
    inputs, outputs = NETWORKS[name]((64, 64, 3), 7)
    assert inputs.shape == (None, 64, 64, 3)
    assert outputs.shape == (None, 7)


def kernels(model, size):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (size, size)
    ]


def silence_blocks(model):
    """Set all 3x3 convolutions but the first to zero: what is left are the shortcuts."""
    for layer in kernels(model, 3)[1:]:
        layer.kernel.assign(np.zeros(layer.kernel.shape))


def stem(model, x):
    """Return the output of the first convolution, which the tests of its padding vouch for."""
    first = kernels(model, 3)[0]
    return numpy(first(array(x)))


def relu(x):
    return np.maximum(x, 0)


def dense(model, features):
    layer = model.layers[-1]
    return features.mean(axis=(1, 2)) @ numpy(layer.kernel) + numpy(layer.bias)


def test_shortcuts_of_resnet_20_halve_the_image_and_add_channels_of_zeros(rng):
    model = keras.Model(*resnet_20((16, 16, 3)))
    silence_blocks(model)
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    features = np.zeros((2, 4, 4, 64))
    features[..., :16] = relu(stem(model, x) / FRESH)[:, ::4, ::4]
    # Sums of 16 products in float32: a few units of 1e-7.
    assert_allclose(model(array(x)), dense(model, features), rtol=1e-5, atol=1e-6)


def test_shortcuts_of_wide_resnet_see_the_activated_input(rng):
    model = keras.Model(*wrn_28_2((16, 16, 3)))
    silence_blocks(model)
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    y = stem(model, x)
    for layer, stride in zip(kernels(model, 1), (1, 2, 2)):
        y = relu(y / FRESH)[:, ::stride, ::stride] @ numpy(layer.kernel)[0, 0]
    assert_allclose(model(array(x)), dense(model, relu(y / FRESH)), rtol=1e-4, atol=1e-5)


def test_shortcuts_of_the_infomcr_code_see_the_raw_input(rng):
    model = keras.Model(*wrn_28_2_infomcr((16, 16, 3)))
    silence_blocks(model)
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    y = stem(model, x)
    for layer, stride in zip(kernels(model, 1), (1, 2, 2)):
        y = y[:, ::stride, ::stride] @ numpy(layer.kernel)[0, 0]
    assert_allclose(model(array(x)), dense(model, relu(y / FRESH)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("strides", [1, 2])
def test_convolutions_are_centred_on_the_pixels_that_shortcuts_take(size, strides, rng):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(
        inputs, layers.conv(inputs, 1, size, strides, l2=0.0, fan="fan_in"), name="one"
    )
    kernel = np.zeros((size, size, 1, 1))
    kernel[size // 2, size // 2] = 1
    model.layers[-1].kernel.assign(kernel)
    x = rng.normal(size=(1, 8, 8, 1)).astype("float32")
    assert_allclose(model(array(x)), x[:, ::strides, ::strides])


def squares(variables):
    return sum(np.sum(np.square(numpy(v), dtype="float64")) for v in variables)


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("resnet-20", 1e-4),
        ("wrn-28-2", 5e-4),
        ("densenet-bc-100-12", 1e-4),
        ("wrn-18-1.5", 1e-4),
    ],
)
def test_weight_decay_of_the_papers_falls_on_all_weights(name, decay):
    model = keras.Model(*NETWORKS[name]())
    # Float32 sums of up to 25 million squares, and of a hundred penalties.
    np.testing.assert_allclose(
        numpy(sum(model.losses)), decay / 2 * squares(model.trainable_variables), rtol=1e-4
    )


def test_penalty_of_the_infomcr_code_falls_on_blocks_and_normalisation():
    model = keras.Model(*wrn_28_2_infomcr())
    penalized = [layer.kernel for layer in kernels(model, 3)[1:]]
    assert len(penalized) == 24
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            penalized += [layer.gamma, layer.beta]
    np.testing.assert_allclose(numpy(sum(model.losses)), 5e-4 * squares(penalized), rtol=1e-5)


def test_no_penalty_without_l2():
    assert keras.Model(*resnet_20(l2=0.0)).losses == []


@pytest.mark.parametrize(
    ("network", "fan"),
    [
        (plain_cnn, lambda shape: shape[0] * shape[1] * shape[2]),
        (resnet_20, lambda shape: shape[0] * shape[1] * shape[2]),
        (wrn_28_2, lambda shape: shape[0] * shape[1] * shape[3]),
        (densenet_bc_100_12, lambda shape: shape[0] * shape[1] * shape[3]),
        (wrn_18_1_5, lambda shape: shape[0] * shape[1] * shape[2]),
        # Glorot's uniform distribution has the variance 2 / (fan_in + fan_out).
        (wrn_28_2_infomcr, lambda shape: shape[0] * shape[1] * (shape[2] + shape[3])),
    ],
)
def test_kernels_start_with_the_variance_of_the_paper_each_by_itself(network, fan):
    model = keras.Model(*network())
    found = [numpy(layer.kernel) for layer in kernels(model, 3) if layer.kernel.shape[2] > 3]
    for kernel in found:
        # The standard deviation of an estimate from n numbers: std / sqrt(2 n). Five of them.
        np.testing.assert_allclose(
            kernel.std(), np.sqrt(2 / fan(kernel.shape)), rtol=5 / np.sqrt(2 * kernel.size)
        )
    assert len({kernel.tobytes() for kernel in found}) == len(found)


def test_depth_of_wide_resnet_is_checked():
    with pytest.raises(ValueError, match=r"`depth` must be 6 n \+ 4. Received: depth=27"):
        wide_resnet(27, 2)


def test_logits_have_the_precision_of_the_weights_under_mixed_policies():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Model(*resnet_20((8, 8, 3)))
    assert model.layers[1].compute_dtype == "bfloat16"
    assert keras.backend.standardize_dtype(model(array(np.zeros((1, 8, 8, 3)))).dtype) == "float32"


@pytest.mark.parametrize("name", ["plain-cnn", "resnet-20", "wrn-28-2", "wrn-28-2-infomcr"])
def test_networks_learn_and_reload(name, tmp_path, rng):
    model = RegularizedModel(*NETWORKS[name]((8, 8, 3), 4))
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        regularizer=SubBatchPerturbation(num_sub_batches=2),
    )
    x, y = rng.normal(size=(32, 8, 8, 3)).astype("float32"), rng.integers(4, size=32)
    losses = model.fit(x, y, batch_size=16, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_allclose(loaded(array(x)), model(array(x)), rtol=1e-5, atol=1e-6)
