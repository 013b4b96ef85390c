import images
import keras
import numpy as np
import pytest


def arrays(rng, **changes):
    found = {
        "x_train": rng.integers(256, size=(6, 4, 5, 3), dtype="uint8"),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(256, size=(3, 4, 5, 3), dtype="uint8"),
        "y_test": np.array([0, 1, 2]),
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


def test_npz_files_are_read(tmp_path, rng):
    written = arrays(rng)
    np.savez(tmp_path / "data.npz", **written)
    found = images.load(str(tmp_path / "data.npz"))
    for key, value in written.items():
        np.testing.assert_array_equal(getattr(found, key), value)
    assert found.num_classes == 3
    assert found.y_train.dtype == "int32"


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_cifar_comes_from_keras(source, rng, monkeypatch):
    written = arrays(rng)

    def load_data():
        # Labels are columns there.
        train = written["x_train"], written["y_train"][:, np.newaxis]
        return train, (written["x_test"], written["y_test"][:, np.newaxis])

    monkeypatch.setattr(getattr(keras.datasets, source), "load_data", load_data)
    found = images.load(source)
    np.testing.assert_array_equal(found.y_test, written["y_test"])
    np.testing.assert_array_equal(found.x_train, written["x_train"])


def test_digits_are_enlarged(digits):
    found = images.load("digits")
    assert found.x_train.shape == (1000, 32, 32, 3)
    assert found.x_test.shape == (797, 32, 32, 3)
    assert found.num_classes == 10
    small = np.concatenate([found.x_train, found.x_test])[:, ::4, ::4, 0]
    assert (
        small.repeat(4, 1).repeat(4, 2) == [*found.x_train[..., 2], *found.x_test[..., 1]]
    ).all()
    # The same images as scikit-learn's, in another order: 16 levels of grey on 255.
    expected = np.round(digits[0] * 255).astype("uint8")
    np.testing.assert_array_equal(
        sorted(image.tobytes() for image in small), sorted(image.tobytes() for image in expected)
    )


def test_first_training_images_are_kept(tmp_path, rng):
    written = arrays(rng)
    np.savez(tmp_path / "data.npz", **written)
    found = images.load(tmp_path / "data.npz", 4)
    np.testing.assert_array_equal(found.x_train, written["x_train"][:4])
    np.testing.assert_array_equal(found.y_train, written["y_train"][:4])
    assert len(found.x_test) == 3


def test_classes_are_counted_before_images_are_left_out(tmp_path, rng):
    np.savez(tmp_path / "data.npz", **arrays(rng))
    assert images.load(tmp_path / "data.npz", 2).num_classes == 3


def test_labels_may_fill_their_type(tmp_path, rng):
    labels = np.array([255, 1, 2, 0, 1, 2], "uint8")
    np.savez(tmp_path / "data.npz", **arrays(rng, y_train=labels))
    assert images.load(tmp_path / "data.npz").num_classes == 256


@pytest.mark.parametrize("number", [0, 7])
def test_number_of_training_images_is_checked(number, tmp_path, rng):
    np.savez(tmp_path / "data.npz", **arrays(rng))
    with pytest.raises(ValueError, match=f"from 1 to 6.*Received: num_train={number}"):
        images.load(tmp_path / "data.npz", number)


def test_pixels_are_normalised_by_the_constants_of_the_infomcr_code():
    pixels = np.array([0, 100, 255], "uint8").reshape(1, 1, 1, 3)
    expected = [-125.307 / 62.9932, (100 - 122.95) / 62.0887, (255 - 113.865) / 66.7048]
    found = images.normalize(pixels)
    assert found.dtype == "float32"
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"must hold the arrays .* which lacks y_test"),
        ({"x_train": np.zeros((6, 4, 5), "uint8")}, r"`x_train`.*shape \[N, height, width, 3\]"),
        ({"x_train": np.zeros((6, 4, 5, 1), "uint8")}, r"Received: shape \(6, 4, 5, 1\)"),
        ({"x_test": np.zeros((3, 5, 5, 3), "uint8")}, r"`x_test`.*be of size \(4, 5, 3\)"),
        ({"x_train": np.zeros((6, 4, 5, 3))}, "from 0 to 255, uint8. Received: float64"),
        ({"y_train": np.zeros(5, "int64")}, r"one label an image. Received: shape \(5,\)"),
        ({"y_train": np.zeros((6, 3), "int64")}, r"one label an image. Received: shape \(6, 3\)"),
        ({"y_train": np.zeros(6)}, "`y_train`.*must be integers. Received: float64"),
        ({"y_test": np.array([0, -1, 2])}, "labels from 0. Received: a label -1"),
        ({"y_test": np.array([0, 1, 3])}, "labels below 3, as y_train. Received: label 3"),
        ({"x_test": np.zeros((0, 4, 5, 3), "uint8")}, "`x_test`.*must not be empty"),
        ({"x_test": np.uint8(3)}, "`x_test`.*must not be empty"),
    ],
)
def test_wrong_arrays_get_clear_errors(changes, message, tmp_path, rng):
    np.savez(tmp_path / "data.npz", **arrays(rng, **changes))
    with pytest.raises(ValueError, match=message):
        images.load(tmp_path / "data.npz")


def test_missing_file_gets_a_clear_error():
    with pytest.raises(FileNotFoundError, match=r"cifar10, cifar100, digits or.*cifar11"):
        images.load("cifar11")


@pytest.mark.parametrize("content", [b"no numbers", b"", b"PK\x03\x04 cut off"])
def test_other_files_get_a_clear_error(content, tmp_path):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ValueError, match="must be npz, of plain arrays"):
        images.load(tmp_path / "data.npz")


def test_arrays_of_objects_get_a_clear_error(tmp_path, rng):
    np.savez(tmp_path / "data.npz", **arrays(rng, y_train=np.array([None] * 6)))
    with pytest.raises(ValueError, match="must be npz, of plain arrays"):
        images.load(tmp_path / "data.npz")
