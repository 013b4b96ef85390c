"""The normalisation of logits: formula, gradient, extremes, precision, files, errors."""

import frameworks
import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_array_equal
from keras import ops

from keras_infomcr.layers import LogitNormalization
from keras_infomcr.layers.logit_normalization import normalize_logits


def normalised(logits, scale=0.04):
    logits = np.asarray(logits, "float64")
    return logits / (scale * np.linalg.norm(logits, axis=-1, keepdims=True))


def jacobian(function, row):
    point = keras.Variable(row[None], dtype=row.dtype)
    return frameworks.jacobian(lambda: function(point.value)[0], [point])


def test_example_of_the_docstring():
    result = LogitNormalization(scale=0.5)(ops.array([[3.0, 4.0]]))
    np.testing.assert_allclose(result, [[1.2, 1.6]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 7)])
def test_formula(rng, shape):
    logits = rng.normal(size=shape).astype("float32")
    result = LogitNormalization()(logits)
    assert result.shape == shape
    # A few roundings of float32 (1.2e-7).
    np.testing.assert_allclose(result, normalised(logits), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result, axis=-1), 25, rtol=1e-6)


def test_formula_in_float64(float64, rng):
    logits = rng.normal(size=(4, 3))
    result = LogitNormalization(0.1)(logits)
    assert keras.backend.standardize_dtype(result.dtype) == "float64"
    np.testing.assert_allclose(result, normalised(logits, 0.1), rtol=1e-14)


def test_gradient_is_the_projection_on_the_sphere(float64, rng):
    row = rng.normal(size=4)
    norm = np.linalg.norm(row)
    expected = (np.eye(4) - np.outer(row, row) / norm**2) / (0.04 * norm)
    result = jacobian(LogitNormalization(), row)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_zero_row_gives_zero_and_zero_gradient():
    row = np.zeros(3, "float32")
    np.testing.assert_array_equal(LogitNormalization()(row[None]), row[None])
    np.testing.assert_array_equal(jacobian(LogitNormalization(), row), np.zeros((3, 3)))
    both = LogitNormalization()(np.array([[0, 0, 0], [1, 2, 2]], "float32"))
    np.testing.assert_array_equal(both[0], row)
    np.testing.assert_allclose(both[1], normalised([1, 2, 2]), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e38])
def test_tiny_and_huge_rows(size):
    """Squares of these under- or overflow in float32; the result is that of an ordinary row."""
    if BACKEND == "jax" and size == 1e38:
        pytest.skip("XLA multiplies by the reciprocal, which it flushes to zero.")
    row = np.array([0.5, -1.0, 2.0], "float32")
    scaled = row * np.float32(size)
    np.testing.assert_allclose(LogitNormalization()(scaled[None])[0], normalised(row), rtol=1e-6)
    if 1e-30 <= size <= 1e30:  # beyond, the gradient itself leaves float32
        gradient = jacobian(LogitNormalization(), scaled) * size
        expected = jacobian(LogitNormalization(), row)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "bfloat16", "mixed_bfloat16"])
def test_half_precision_policies_compute_in_float32(policy):
    # 300^2 overflows float16, and the norm is not representable in bfloat16.
    logits = np.array([[300.0, -400.0, 1200.0], [1e-4, 2e-4, 2e-4]], "float32")
    layer = LogitNormalization(dtype=policy)
    half = ops.cast(logits, layer.compute_dtype)
    result = layer(half)
    assert keras.backend.standardize_dtype(result.dtype) == layer.compute_dtype
    # The one rounding of the result: half a unit of 11 or 8 binary digits.
    unit = 2.0**-11 if "float16" in policy and "b" not in policy else 2.0**-8
    expected = normalised(ops.cast(half, "float32"))
    np.testing.assert_allclose(ops.cast(result, "float32"), expected, rtol=1.01 * unit)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "float32", "float64"])
def test_function_computes_in_float32_at_least(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("float64")
    result = normalize_logits(ops.cast([[3, 4]], dtype), 0.04)
    expected = "float64" if dtype == "float64" else "float32"
    assert keras.backend.standardize_dtype(result.dtype) == expected
    np.testing.assert_allclose(result, [[15, 20]], rtol=1e-6)


def test_symbolic_shape_and_mask():
    inputs = keras.Input((None, 5))
    assert LogitNormalization()(inputs).shape == (None, None, 5)
    assert LogitNormalization().compute_output_shape((2, 5)) == (2, 5)
    masked = keras.layers.Masking()(ops.zeros((2, 3, 5)))
    result = LogitNormalization()(masked)
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(result), np.zeros((2, 3)))


def test_layer_is_built_without_weights():
    layer = LogitNormalization()
    assert layer.built
    assert layer.weights == []


def test_config_round_trip():
    layer = LogitNormalization(scale=0.2, name="spheres")
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "keras_infomcr>LogitNormalization"
    loaded = keras.saving.deserialize_keras_object(config)
    assert (loaded.scale, loaded.name) == (0.2, "spheres")


def test_model_is_trained_saved_and_loaded(tmp_path, rng):
    x, y = rng.normal(size=(16, 6)).astype("float32"), rng.integers(0, 3, 16)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), LogitNormalization(0.5)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=5, verbose=0)
    assert model.evaluate(x, y, verbose=0) < before
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].scale == 0.5
    assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, "0.04", None, True, [1.0]])
def test_scale_out_of_range(scale):
    with pytest.raises(ValueError, match=r"`scale` must be a finite number greater than 0\. Rec"):
        LogitNormalization(scale)
