import itertools

import images
import numpy as np
import pytest
from frameworks import tensorflow

tensorflow()
import augmentation  # noqa: E402

BATCH_SIZE = 128
SIZE = 32

# Each image tells where its pixels come from, and which image it is.
ROWS, COLUMNS = np.meshgrid(range(1, SIZE + 1), range(1, SIZE + 1), indexing="ij")
LABELS = np.arange(200)
PIXELS = np.stack(
    [np.stack([ROWS, COLUMNS, np.full_like(ROWS, label)], axis=-1) for label in LABELS]
).astype("uint8")

pytestmark = pytest.mark.slow


@pytest.fixture(params=["tf.data", "keras-cv"])
def use_keras_cv(request):
    if request.param == "keras-cv":
        pytest.importorskip("keras_cv", reason="the extra cv is not installed")
    return request.param == "keras-cv"


def batches(scheme, number, use_keras_cv=False, **options):
    found = augmentation.training_batches(
        PIXELS, LABELS, scheme, BATCH_SIZE, use_keras_cv=use_keras_cv, **options
    )
    return [(x.numpy(), y.numpy()) for x, y in itertools.islice(found, number)]


def offsets_and_flips(x, labels, padding):
    """Return what was done to images `[N, H, W, 3]`; fail if it was not one crop and a flip."""
    normalized = images.normalize(PIXELS)
    padded = np.pad(normalized, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    # Around the middle nothing is padding; rounding undoes the normalisation's errors of 1e-5.
    pixels = np.rint(x[:, 16, 15:17] * images.STANDARD_DEVIATION + images.MEAN).astype(int)
    flips = pixels[:, 1, 1] < pixels[:, 0, 1]
    tops = pixels[:, 0, 0] - 17 + padding
    lefts = np.where(flips, pixels[:, 1, 1], pixels[:, 0, 1]) - 16 + padding
    for image, label, top, left, flip in zip(x, labels, tops, lefts, flips):
        expected = padded[label, top : top + SIZE, left : left + SIZE]
        # In float32, as the package of examples computes it elsewhere: one rounding apart.
        np.testing.assert_allclose(image, expected[:, ::-1] if flip else expected, atol=1e-6)
    return np.stack([tops, lefts], axis=1), flips


@pytest.mark.parametrize("scheme", augmentation.SCHEMES)
def test_each_image_is_cropped_and_flipped_by_itself_with_equal_chances(scheme, use_keras_cv):
    padding, flip = augmentation.SCHEMES[scheme]
    found = [offsets_and_flips(*b, padding) for b in batches(scheme, 40, use_keras_cv)]
    # In one batch already.
    assert len(np.unique(found[0][0], axis=0)) > (1 if padding else 0)
    number = 40 * BATCH_SIZE
    offsets = np.concatenate([o for o, _ in found])
    counts = np.zeros((2 * padding + 1,) * 2)
    np.add.at(counts, tuple(offsets.T), 1)
    expected = number / counts.size
    # Five standard deviations of a binomial count.
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(expected) if padding else 0)
    flips = np.concatenate([f for _, f in found])
    assert abs(flips.sum() - flip * number / 2) <= 5 * np.sqrt(number / 4) * flip
    # Crops and flips are independent: as many of the flipped images lie above the middle.
    above = (offsets[:, 0] < padding)[flips]
    share = padding / (2 * padding + 1)
    assert abs(above.sum() - share * len(above)) <= 5 * np.sqrt(len(above) / 4)


def test_no_augmentation_normalises_alone(use_keras_cv):
    for x, y in batches("no-aug", 2, use_keras_cv):
        np.testing.assert_allclose(x, images.normalize(PIXELS[y]), atol=1e-6)


def test_an_epoch_sees_no_image_twice_and_epochs_differ():
    found = batches("no-aug", 2)  # of 200 images a batch of 128 leaves 72 over
    for _, labels in found:
        assert len(np.unique(labels)) == BATCH_SIZE
    assert (found[0][1] != found[1][1]).any()


def test_epochs_are_the_same_wherever_a_run_begins(use_keras_cv):
    whole = batches("4-crop-f", 5, use_keras_cv, seed=3)
    rest = batches("4-crop-f", 2, use_keras_cv, seed=3, first_epoch=3)
    for (x, y), (x_again, y_again) in zip(whole[3:], rest):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)


def test_seeds_differ(use_keras_cv):
    (first, first_labels), (second, second_labels) = (
        batches("4-crop-f", 1, use_keras_cv, seed=seed)[0] for seed in (0, 1)
    )
    assert (first_labels != second_labels).any()
    assert (first != second).any()


def test_batches_may_not_be_larger_than_the_data():
    with pytest.raises(ValueError, match=r"at most the number of training images, 200.*=201"):
        augmentation.training_batches(PIXELS, LABELS, "no-aug", 201)
