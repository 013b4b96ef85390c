"""Pictures of spectra, of noise and of gamma-hat over epochs: what they draw, and can be read."""

import itertools
import math

import keras
import numpy as np
import pytest
from nets import NUM_CLASSES, classifier

from keras_infomcr import GammaHatCallback
from keras_infomcr.flatness import Estimate, LocalEnergy, SpectralDensity, plot

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def assert_readable(axes):
    """Assert that both axes say what they are, and that no two labels of ticks overlap."""
    assert axes.get_xlabel() and axes.get_ylabel()
    axes.figure.canvas.draw()
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [t.label1.get_window_extent() for t in ticks if t.label1.get_text()]
        assert len(boxes) > 1
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def density(top, num_weights=1000, width=0.1):
    """Return a density of two bumps, the smaller one at `top`."""
    grid = np.linspace(-1, top + 1, 200)
    bumps = [np.exp(-(((grid - c) / width) ** 2) / 2) for c in (0, top)]
    value = (bumps[0] + bumps[1] / 100) / (width * math.sqrt(2 * math.pi))
    return SpectralDensity(value, value / 10, grid, width, num_weights)


def energy(slope, sigma=(0.0, 0.2, 0.1)):
    sigma = np.array(sigma)
    rises = slope * sigma
    samples = np.stack([rises, rises])
    return LocalEnergy(2 * rises, rises / 5, samples, rises, rises / 10, sigma)


LOGS = {
    "gamma_hat": [math.nan, -3.0, -5.0],
    "gamma_hat_stderr": [math.nan, 0.5, math.nan],
    "gamma_hat_log_loss_part": [math.nan, -7.0, -10.0],
}


def test_densities_stand_above_each_other_on_one_scale():
    results = [density(1.0), density(4.0), density(2.0)]
    axes = plot.spectral_density(results, labels=["start", 10, "end"])
    assert_readable(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["start", "10", "end"]
    floor = 0.01 / (1000 * 0.1)
    for row, (line, result) in enumerate(zip(axes.lines, results)):
        np.testing.assert_array_equal(line.get_xdata(), result.grid)
        heights = row - line.get_ydata()
        assert heights.min() == 0
        # As far above the row as the density is above the floor, by its logarithm.
        logarithms = np.log(np.maximum(result.value / floor, 1))
        np.testing.assert_allclose(heights, heights.max() * logarithms / logarithms.max())
    low, high = axes.get_ylim()
    assert high < min(line.get_ydata().min() for line in axes.lines) and low > 2
    axes = plot.spectral_density(results)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert plot.spectral_density(results[:1], axes) is axes


def test_one_density_is_drawn_with_its_error():
    result = density(3.0)
    axes = plot.spectral_density(result)
    assert_readable(axes)
    (line,), (band,) = axes.lines, axes.collections
    np.testing.assert_array_equal(line.get_xdata(), result.grid)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(1.1 * result.value.max())


def test_local_energies_of_several_data():
    axes = plot.local_energy([energy(0.1), energy(0.3)], labels=["training", "test"])
    assert_readable(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "test"]
    for container, slope in zip(axes.containers, (0.1, 0.3)):
        line, _, (bars,) = container
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.1, 0.2])  # in order
        np.testing.assert_allclose(line.get_ydata(), 100 * slope * np.array([0, 0.1, 0.2]))
        lengths = [high[1] - low[1] for low, high in bars.get_segments()]
        np.testing.assert_allclose(lengths, 2 * line.get_ydata() / 10, atol=1e-12)
    assert "percentage points" in axes.get_ylabel()


def test_local_energy_of_the_loss():
    own = pyplot.figure().subplots()
    axes = plot.local_energy(energy(0.1), own, quantity="loss")
    assert axes is own
    assert_readable(axes)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0, 0.02, 0.04])
    assert axes.get_legend() is None
    assert axes.get_ylabel() == "rise of the loss"


def test_gamma_hat_with_its_two_parts():
    axes = plot.gamma_hat(LOGS)
    assert_readable(axes)
    lines = {line.get_label(): line for line in axes.lines}
    whole, losses, geometry = axes.containers[0][0], *(
        lines[name] for name in ("part of the losses", "geometry")
    )  # fmt: skip
    for line, expected in ((whole, [-3, -5]), (losses, [-7, -10]), (geometry, [4, 5])):
        np.testing.assert_array_equal(line.get_xdata(), [2, 3])  # without the first, not measured
        np.testing.assert_array_equal(line.get_ydata(), expected)
    few = {name: LOGS[name] for name in ("gamma_hat", "gamma_hat_stderr")}
    axes = plot.gamma_hat(few, pyplot.figure().subplots())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gamma-hat"]


def test_gamma_hat_of_a_training_that_went_on(rng):
    """What the callback logs is what is drawn; epochs are counted on."""
    x, y = rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 12)
    callback = GammaHatCallback((x, y), num_examples=4, num_trials=2, frequency=2)
    model = classifier()
    settings = {"epochs": 7, "initial_epoch": 3, "verbose": 0}
    history = model.fit(x, y, callbacks=[callback], **settings)
    axes = plot.gamma_hat(history)
    assert_readable(axes)
    (line,) = [line for line in axes.lines if line.get_label() == "geometry"]
    np.testing.assert_array_equal(line.get_xdata(), [4, 6, 7])
    assert line.get_ydata()[-1] == pytest.approx(callback.result.geometry_part)


@pytest.mark.parametrize(
    ("draw", "error", "text"),
    [
        (lambda: plot.local_energy([energy(1), Estimate(1.0, 1.0, np.ones(1))]), TypeError,
         "`result` must be a `LocalEnergy`. Received: result=Estimate"),
        (lambda: plot.local_energy(energy(1, sigma=0.1)), ValueError,
         "`result` must be of several sigmas. Received: result of sigma="),
        (lambda: plot.local_energy(energy(math.nan)), ValueError,
         "The 0-1 error must be known, which it is for one cross-entropy alone. Received: result"),
        (lambda: plot.local_energy(energy(1), quantity="accuracy"), ValueError,
         "`quantity` must be one of 'error', 'loss'. Received: quantity='accuracy'"),
        (lambda: plot.local_energy([energy(1)], labels=["a", "b"]), ValueError,
         "as many `labels` as results. Received: labels=['a', 'b'], 1 results"),
        (lambda: plot.spectral_density([]), ValueError, "There must be a result at least"),
        (lambda: plot.spectral_density(["a"]), TypeError,
         "`result` must be a `SpectralDensity`. Received: result='a'"),
        (lambda: plot.gamma_hat({"loss": [1.0]}), ValueError,
         "`history` must hold the logs of `GammaHatCallback`. Received: history with ['loss']"),
        (lambda: plot.gamma_hat(keras.callbacks.History()), ValueError, "`history` must hold the"),
    ],
)  # fmt: skip
def test_what_is_refused(draw, error, text):
    with pytest.raises(error) as caught:
        draw()
    assert text in str(caught.value)
