"""Images to train on: CIFAR, a file of one's own, or scikit-learn's digits."""

import dataclasses
import pathlib
import zipfile

import keras
import numpy as np

# Mean and standard deviation of each channel of CIFAR-10's training images, as the InfoMCR code
# has them.
MEAN = np.array([125.307, 122.95, 113.865], "float32")
STANDARD_DEVIATION = np.array([62.9932, 62.0887, 66.7048], "float32")

KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True)
class Images:
    """Training and test images `[N, height, width, 3]`, uint8, and labels `[N]`, int32.

    Labels run from 0 to `num_classes - 1`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int


def digits(seed=None):
    """Return scikit-learn's 1,797 handwritten digits; nothing is downloaded.

    Args:
        seed: Integer, or a `numpy.random.Generator`, that draws their order. `None`: the order of
            scikit-learn, in which neighbours are similar, for some were written by one hand.

    Returns:
        Tuple of images `[1797, 8, 8, 1]`, float32, pixels from -1 (paper) to 1 (ink) in steps of
        an eighth; and labels `[1797]`, int32.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).reshape(-1, 8, 8, 1).astype("float32")
    labels = labels.astype("int32")
    if seed is None:
        return images, labels
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order], labels[order]


def normalize(images):
    """Return images with about zero mean and unit variance, as the InfoMCR code does."""
    return (np.asarray(images, "float32") - MEAN) / STANDARD_DEVIATION


def load(source, num_train=None):
    """Load and check images.

    Args:
        source: `"cifar10"`, `"cifar100"` (which Keras downloads), `"digits"` (scikit-learn's, four
            times as high and wide; 1,000 to train, 797 to test), or the path of an npz file with
            `x_train`, `y_train`, `x_test` and `y_test`.
        num_train: Integer, the number of training images to keep, the first ones; or `None`: all.

    Returns:
        `Images`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If arrays are missing or not as they must be, or are too few.
    """
    if source == "digits":
        arrays = _enlarged_digits()
    elif source in ("cifar10", "cifar100"):
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, source).load_data()
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    else:
        arrays = _read(pathlib.Path(source))
    for split in ("train", "test"):
        labels = arrays[f"y_{split}"]
        if labels.ndim == 2 and labels.shape[1] == 1:  # as `keras.datasets` has them
            arrays[f"y_{split}"] = labels[:, 0]
    _check(arrays, source)
    total = len(arrays["x_train"])
    if num_train is not None and not 1 <= num_train <= total:
        raise ValueError(
            f"`num_train` must be from 1 to {total}, the number of training images of {source}. "
            f"Received: num_train={num_train}"
        )
    return Images(
        x_train=arrays["x_train"][:num_train],
        y_train=arrays["y_train"][:num_train].astype("int32"),
        x_test=arrays["x_test"],
        y_test=arrays["y_test"].astype("int32"),
        num_classes=int(arrays["y_train"].max()) + 1,
    )


def _enlarged_digits():
    images, labels = digits(seed=0)
    pixels = np.round((images + 1) * (255 / 2)).astype("uint8")
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    return dict(zip(KEYS, (pixels[:1000], labels[:1000], pixels[1000:], labels[1000:])))


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(
            "The data must be cifar10, cifar100, digits or the path of an npz file. "
            f"Received: {path}, which is no file"
        )
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            missing = [key for key in KEYS if key not in file]
            if not missing:
                return {key: file[key] for key in KEYS}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"The data file must be npz, of plain arrays. Received: {path}") from error
    raise ValueError(
        f"The data file must hold the arrays {', '.join(KEYS)}. Received: {path}, which lacks "
        f"{', '.join(missing)}"
    )


def _check(arrays, source):
    def check(holds, key, must, found):
        if not holds:
            raise ValueError(f"`{key}` of {source} must {must}. Received: {found}")

    size = arrays["x_train"].shape[1:]
    for split in ("train", "test"):
        for key in (f"x_{split}", f"y_{split}"):
            check(len(arrays[key].shape) and len(arrays[key]), key, "not be empty", "no values")
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        check(
            x.ndim == 4 and x.shape[-1] == 3,
            f"x_{split}",
            "be colour images of shape [N, height, width, 3]",
            f"shape {x.shape}",
        )
        check(x.shape[1:] == size, f"x_{split}", f"be of size {size}, as x_train", x.shape[1:])
        check(x.dtype == "uint8", f"x_{split}", "be pixels from 0 to 255, uint8", x.dtype)
        check(y.shape == x.shape[:1], f"y_{split}", "have one label an image", f"shape {y.shape}")
        check(np.issubdtype(y.dtype, np.integer), f"y_{split}", "be integers", y.dtype)
        check(y.min() >= 0, f"y_{split}", "be labels from 0", f"a label {y.min()}")
    classes = int(arrays["y_train"].max()) + 1  # as uint8, 255 + 1 would be 0
    largest = arrays["y_test"].max()
    check(largest < classes, "y_test", f"be labels below {classes}, as y_train", f"label {largest}")
