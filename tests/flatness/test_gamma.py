"""gamma, gamma-hat by layer and its picture, trials that stop by themselves."""

import math

import keras
import numpy as np
import pytest
from keras import layers
from nets import NUM_CLASSES, classifier, sequential
from parameters import slow_but

from keras_infomcr import flatness
from keras_infomcr.flatness import Estimate, gamma, gamma_hat, gamma_hat_by_layer, plot


@pytest.fixture
def data(rng):
    return rng.normal(size=(60, 6)).astype("float32"), rng.integers(0, NUM_CLASSES, 60)


def test_gamma_is_the_papers_function_of_gamma_hat(data):
    model = classifier()
    settings = {"num_examples": 5, "num_trials": 3, "seed": 0}
    result = gamma(model, *data, **settings)
    expected = gamma_hat(model, *data, **settings)
    num_weights = 6 * 8 + 8 + 8 * 4 + 4
    assert result.num_weights == num_weights
    np.testing.assert_allclose(result.gamma_hat.trials, expected.trials, rtol=1e-6)
    value = num_weights / 5 * result.gamma_hat.value + num_weights * math.log(1 / num_weights)
    assert result.value == pytest.approx(value, rel=1e-12)
    assert result.stderr == pytest.approx(num_weights / 5 * result.gamma_hat.stderr, rel=1e-12)


def test_gamma_of_a_diagonal_fisher_information(float64):
    """Where each example has a direction of its own, the relation is exact.

    A linear binary classifier on the unit vectors: J is diagonal with sigmoid(-m_i), so that I =
    J^T J / W has the eigenvalues sigmoid(-m_i)^2 / W, with N' = W.
    """
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = sequential(layers.Dense(1, use_bias=False), loss=loss)
    w = np.linspace(-1, 1, 6)
    model.set_weights([w[:, None]])
    result = gamma(model, np.eye(6), np.ones(6), num_examples=6, num_trials=1)
    expected = np.sum(np.log((1 / (1 + np.exp(w))) ** 2 / 6))
    assert result.value == pytest.approx(expected, rel=1e-12)


def test_gamma_of_each_trial(data):
    result = gamma(classifier(), *data, num_examples=5, num_trials=3, seed=0)
    assert result.value == pytest.approx(np.mean(result.samples), rel=1e-12)
    assert result.stderr == pytest.approx(np.std(result.samples, ddof=1) / math.sqrt(3), rel=1e-9)


TRIALS = [name for name in flatness.__all__ if name.startswith(("gamma", "fisher"))]
TRIALS.remove("fisher_rao_norm")  # of all of the data


@pytest.mark.parametrize("name", [*TRIALS, "input_jacobian_norm"])
def test_a_mistyped_argument_is_named_by_the_function_that_was_called(data, name):
    for wrong in ("num_example", "loses", "relative_tolerence"):
        message = rf"{name}\(\) got an unexpected keyword argument '{wrong}'"
        with pytest.raises(TypeError, match=message):
            getattr(flatness, name)(classifier(), *data, **{wrong: 5})


@pytest.mark.parametrize("name", slow_but(TRIALS, "gamma_hat", "fisher_trace"))
def test_progress_counts_the_trials(data, capsys, name):
    measure = getattr(flatness, name)
    measure(classifier(), *data, num_examples=4, num_trials=3, verbose=1)
    assert "3/3" in capsys.readouterr().out
    measure(classifier(), *data, num_examples=4, num_trials=3)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`verbose` must be one of 0, 1\. Received: verbose=2"):
        measure(classifier(), *data, num_examples=4, num_trials=3, verbose=2)


def test_progress_of_automatic_trials(data, capsys):
    settings = {"num_examples": 4, "num_trials": "auto", "relative_tolerance": 10.0}
    gamma_hat(classifier(), *data, verbose=1, **settings)
    assert "5/Unknown" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in TRIALS if n != "gamma_hat_by_layer"])
def test_results_are_estimates(data, name):
    result = getattr(flatness, name)(classifier(), *data, num_examples=4, num_trials=3)
    assert isinstance(result, Estimate)
    assert float(result) == result.value and result.samples.shape == (3,)


def test_only_gamma_hat_averages_a_hundred_trials_by_default():
    defaults = {n: getattr(flatness, n).__kwdefaults__["num_trials"] for n in TRIALS}
    assert defaults == dict.fromkeys(TRIALS, 10) | {"gamma_hat": 100}


def test_layers_of_their_own_models(float64, rng):
    """With all layers but one frozen, gamma-hat is that layer's."""
    x, y = rng.normal(size=(24, 6)), rng.integers(0, NUM_CLASSES, 24)
    model = classifier()
    settings = {"num_examples": 8, "num_trials": 3, "seed": 0}
    result = gamma_hat_by_layer(model, x, y, **settings)
    assert result.num_weights == (56, 36)
    assert result.layers == tuple(layer.path for layer in model.layers)
    for k in range(2):
        model.layers[k].trainable, model.layers[1 - k].trainable = True, False
        alone = gamma_hat(model, x, y, **settings)
        assert result.values[k] == pytest.approx(alone.value, rel=1e-9)
        assert result.stderrs[k] == pytest.approx(alone.stderr, rel=1e-6)


def test_layers_with_fewer_weights_than_examples_have_no_finite_value(data):
    model = sequential(layers.Dense(8), layers.BatchNormalization(), layers.Dense(NUM_CLASSES))
    result = gamma_hat_by_layer(model, *data, num_examples=20, num_trials=2)
    assert list(np.isfinite(result.values)) == [True, False, True]
    assert np.isnan(result.stderrs[1])


def test_by_layer_takes_no_automatic_number_of_trials(data):
    with pytest.raises(ValueError, match="`num_trials` must be an integer of at least 1"):
        gamma_hat_by_layer(classifier(), *data, num_trials="auto")


def test_picture_has_a_bar_for_each_finite_layer(data):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    model = sequential(layers.Dense(8), layers.BatchNormalization(), layers.Dense(NUM_CLASSES))
    result = gamma_hat_by_layer(model, *data, num_examples=20, num_trials=2)
    axes = plot.by_layer(result)
    assert [p.get_width() for p in axes.patches] == list(result.values[[0, 2]])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(result.layers)
    assert [t.get_text() for t in axes.texts] == ["not finite"]
    own = pyplot.figure().subplots()
    assert plot.by_layer(result, own) is own
    pyplot.close("all")


# ---------------------------------------------------------------- as many trials as needed


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_automatic_trials_stop_at_the_first_that_is_good_enough(data, tolerance):
    model = classifier()
    settings = {"num_examples": 4, "seed": 0}
    every = gamma_hat(model, *data, num_trials=100, **settings).trials
    result = gamma_hat(model, *data, num_trials="auto", relative_tolerance=tolerance, **settings)
    counts = [
        n
        for n in range(5, 101)
        if np.std(every[:n], ddof=1) / math.sqrt(n) <= tolerance * abs(every[:n].mean())
    ]
    np.testing.assert_allclose(result.trials, every[: counts[0] if counts else 100], rtol=1e-5)


def test_automatic_trials_end_at_a_singular_one(data):
    model = classifier()
    x = np.repeat(data[0][:1], 20, axis=0)
    with pytest.warns(UserWarning, match="gamma_hat is not finite"):
        result = gamma_hat(model, x, np.zeros(20), num_examples=4, num_trials="auto")
    assert len(result.trials) == 1


def test_automatic_trials_read_no_more_than_a_hundred(data):
    result = gamma_hat(
        classifier(), *data, num_examples=2, num_trials="auto", relative_tolerance=1e-9
    )
    assert len(result.trials) == 100


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1"])
def test_bad_tolerances(data, value):
    with pytest.raises(ValueError, match="`relative_tolerance` must be a finite number"):
        gamma_hat(classifier(), *data, relative_tolerance=value)


@pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")
@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (plot.by_layer, "GammaHatByLayer` or `HessianTraceByLayer"),
        (plot.spectral_density, "SpectralDensity"),
    ],
)
def test_pictures_of_another_result_are_refused(data, draw, kind):
    result = gamma_hat(classifier(), *data, num_examples=4, num_trials=1)
    with pytest.raises(TypeError, match=rf"`result` must be a `{kind}`\. Received: result=GammaH"):
        draw(result)
