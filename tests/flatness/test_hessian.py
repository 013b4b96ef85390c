"""Measures of the Hessian against one formed in float64 by NumPy alone, and another library."""

import tracemalloc
import warnings

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy, only_on
from hessian_nets import FLAT, NETS, Net
from keras import layers

from keras_infomcr.flatness import (
    hessian_frobenius_norm,
    hessian_spectral_density,
    hessian_spectral_radius,
    hessian_top_eigenvalues,
    hessian_trace,
    plot,
)
from keras_infomcr.flatness.loss.loss_function import LossFunction

# Small networks with random weights may be wrong about their few examples, as a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not fit:UserWarning")

MEASURES = [
    hessian_frobenius_norm,
    hessian_spectral_radius,
    hessian_top_eigenvalues,
    hessian_trace,
]


WITH_CONVOLUTIONS = ("conv_batch_norm", "group_norm", "resized")
PARAMS = [pytest.param(n, marks=[pytest.mark.slow] * (n in WITH_CONVOLUTIONS)) for n in NETS]


@pytest.fixture(params=PARAMS, scope="module")
def net(request):
    return Net(request.param, np.random.default_rng(0))


@pytest.fixture
def small(rng):
    return Net("layer_norm", rng)


@pytest.fixture(scope="module")
def unchanged():
    """Return what `small` does, compiled once for the tests that do not change its model."""
    return Net("layer_norm", np.random.default_rng(0))


# Dense layers with batch normalisation in both modes; CI tries the others.
FAST = [("dense_batch_norm", False), ("dense_batch_norm", True)]
PRODUCTS = [
    pytest.param(n, t, id=f"{n}-{t}", marks=[pytest.mark.slow] * ((n, t) not in FAST))
    for n in NETS
    for t in (False, True)
]


@pytest.mark.parametrize(("name", "training"), PRODUCTS)
def test_products_with_vectors(name, training, rng):
    """The bound is that of docs/flatness.md; float32 itself rounds to some 1e-6."""
    net = Net(name, rng)
    loss = LossFunction(net.model, training)
    vectors = rng.normal(size=(2, loss.size))
    products = loss.hessian_vector_products([(net.x, net.y)], loss.point(), vectors)
    for vector, found in zip(vectors, products):
        expected = net.product(vector, training)
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def test_eigenvalues_against_the_hessian_formed(net):
    eigenvalues = np.linalg.eigvalsh(net.hessian)
    radius = net.measured(hessian_spectral_radius)
    size = np.abs(eigenvalues).max()
    assert radius.value == pytest.approx(size, rel=0.01)
    # The default tolerance: a hundredth of each, or of a tenth of the largest.
    assert radius.largest == pytest.approx(eigenvalues[-1], rel=0.01, abs=1e-3 * size)
    assert radius.smallest == pytest.approx(eigenvalues[0], rel=0.01, abs=1e-3 * size)
    top = net.measured(hessian_top_eigenvalues, num_eigenvalues=4)
    expected = eigenvalues[np.argsort(-np.abs(eigenvalues))][:4]
    # A hundredth of each, or of a hundredth of the largest.
    np.testing.assert_allclose(top.eigenvalues, expected, rtol=0.01, atol=1e-4 * size)
    assert top.value == top.eigenvalues[0]
    assert top.samples.shape == (1, 4)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_against_the_hessian_formed(net, method):
    found = net.measured(hessian_trace, method=method, num_products=60)
    assert found.value == pytest.approx(np.trace(net.hessian), abs=3 * found.stderr)
    assert found.stderr < 0.2 * abs(found.value)  # else the test would mean little
    assert found.value == found.samples.mean()
    assert len(found.samples) == {"hutchinson": 60, "hutch++": 20}[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_frobenius_norm_against_the_hessian_formed(net, method):
    found = net.measured(hessian_frobenius_norm, method=method, num_products=60)
    assert found.value == pytest.approx(np.linalg.norm(net.hessian), abs=3 * found.stderr)
    assert found.stderr < 0.2 * found.value
    assert len(found.samples) == {"hutchinson": 60, "hutch++": 20}[method]
    # The squares of the samples are averaged.
    assert found.value == pytest.approx(np.sqrt((found.samples**2).mean()))


@pytest.mark.slow
def test_density_against_the_hessian_formed(unchanged):
    """With as many steps as weights, a probe's density is blurred about all its eigenvalues."""
    eigenvalues = np.linalg.eigvalsh(unchanged.hessian)
    found = unchanged.measured(hessian_spectral_density, num_probes=40, num_steps=60, width=0.05)
    assert found.num_weights == len(eigenvalues)
    assert np.trapezoid(found.value, found.grid) == pytest.approx(1, rel=1e-4)
    distances = (found.grid[:, None] - eigenvalues) / found.width
    exact = np.exp(-(distances**2) / 2).mean(1) / (found.width * np.sqrt(2 * np.pi))
    errors = np.abs(found.value - exact)[found.value > 0.01 * found.value.max()]
    stderrs = found.stderr[found.value > 0.01 * found.value.max()]
    # Some twenty widths of the grid are independent; 5 standard errors of 40 draws are rarer than
    # one in 50,000.
    assert np.all(errors <= 5 * stderrs)


def test_density_finer_than_its_grid_is_by_default_has_the_integral_1(unchanged):
    found = unchanged.measured(hessian_spectral_density, num_probes=1, num_steps=5, width=1e-4)
    assert np.trapezoid(found.value, found.grid) == pytest.approx(1, rel=1e-6)


def test_density_of_one_probe_has_no_error(unchanged):
    found = unchanged.measured(hessian_spectral_density, num_probes=1, num_steps=3)
    assert np.isnan(found.stderr).all()
    assert found.width == pytest.approx((found.grid[-1] - found.grid[0]) / 110)


def test_density_is_drawn(unchanged):
    found = unchanged.measured(hessian_spectral_density, num_probes=2, num_steps=5)
    axes = plot.spectral_density(found)
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), found.grid)
    assert axes.get_yscale() == "log"
    assert plot.spectral_density(found, axes) is axes


# ---------------------------------------------------------------- the data


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
def test_batches_do_not_change_the_measure(unchanged, measure):
    whole, in_parts = (unchanged.measured(measure, chunk_size=b).value for b in (24, 7))
    # Sums in another order: float32's rounding of a few dozen terms.
    assert in_parts == pytest.approx(whole, rel=1e-5)


def test_training_sees_the_batches(rng):
    net = Net("dense_batch_norm", rng)
    whole, in_parts = (
        net.measured(hessian_trace, training=True, chunk_size=b).value for b in (24, 6)
    )
    assert in_parts != pytest.approx(whole, rel=1e-3)


class Lazy(keras.utils.PyDataset):
    """Makes its batches when they are asked for, and counts the passes."""

    def __init__(self, x, y, size, length=1, **kwargs):
        super().__init__(**kwargs)
        self.batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        self.length, self.passes = length, 0

    def __len__(self):
        return self.length * len(self.batches)

    def __getitem__(self, index):
        self.passes += index % len(self.batches) == 0
        return tuple(a.copy() for a in self.batches[index % len(self.batches)])


def datasets(x, y):
    yield Lazy(x, y, 10)
    yield [(x[:10], y[:10]), (x[10:], y[10:])]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        yield tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    if BACKEND == "torch":
        import torch

        pairs = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
        yield torch.utils.data.DataLoader(pairs, batch_size=10)
    yield array(x), array(y)


@pytest.mark.slow
def test_data_of_all_kinds(unchanged):
    expected = unchanged.measured(hessian_trace, num_products=6).value
    for data in datasets(unchanged.x, unchanged.y):
        pair = data if isinstance(data, tuple) else (data,)
        found = hessian_trace(unchanged.model, *pair, num_products=6, seed=0)
        assert found.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [hessian_frobenius_norm, hessian_trace])
def test_memory_does_not_grow_with_the_products(measure):
    """Forty more vectors like the weights are 84 MB, of which ten may be freed late."""
    model = keras.Sequential([keras.Input((512,)), layers.Dense(1024)])
    model.compile("sgd", "mse")
    x, y = np.ones((1, 512), "float32"), np.ones((1, 1024), "float32")
    peaks = []
    for num_products in (20, 20, 60):  # the first compiles
        tracemalloc.start()
        measure(model, x, y, num_products=num_products, method="hutchinson", seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 25e6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(unchanged):
    """Two hundred batches of 128 kB are 26 MB, of which one or two live at a time."""
    x, y = np.repeat(unchanged.x, 167, axis=0)[:4000], np.repeat(unchanged.y, 167, axis=0)[:4000]
    settings = {"num_products": 2, "method": "hutchinson", "seed": 0}
    hessian_trace(unchanged.model, Lazy(x, y, 4000), **settings)
    data = Lazy(x, y, 4000, length=200)
    tracemalloc.start()
    hessian_trace(unchanged.model, data, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two products at once, and a batch to see whether the model fits its data.
    assert data.passes == 200 + 1
    assert peak < 3e6


@pytest.mark.slow
def test_trials_are_averaged(unchanged):
    found = unchanged.measured(hessian_spectral_radius, num_examples=6, num_trials=4)
    assert found.samples.shape == (4,)
    assert found.value == found.samples.mean()
    assert found.stderr == pytest.approx(found.samples.std(ddof=1) / 2)
    # Four trials of six share none of the 24 examples: their losses' mean is the loss of all.
    whole = unchanged.measured(hessian_trace, num_products=60)
    parts = unchanged.measured(hessian_trace, num_products=60, num_examples=6, num_trials=4)
    assert parts.value == pytest.approx(whole.value, abs=4 * whole.stderr)
    assert len(parts.samples) == 4


def test_one_trial_of_all_examples_is_the_whole(unchanged):
    one = unchanged.measured(hessian_trace, num_examples=24, num_trials=1)
    whole = unchanged.measured(hessian_trace)
    assert one.value == pytest.approx(whole.value, rel=1e-5)
    assert one.stderr == pytest.approx(whole.stderr, rel=1e-3)
    assert np.isnan(unchanged.measured(hessian_spectral_radius).stderr)


@pytest.mark.slow
def test_seeds(unchanged):
    values = [unchanged.measured(hessian_trace, num_products=6).value for _ in range(2)]
    assert values[0] == values[1]
    seeds = (1, None, None)
    args = unchanged.model, unchanged.x, unchanged.y
    others = [hessian_trace(*args, num_products=6, seed=seed).value for seed in seeds]
    assert len({values[0], *others}) == 4


# ---------------------------------------------------------------- the model


def test_weight_penalties_are_left_out(small, rng):
    expected = small.measured(hessian_trace).value
    for variable in small.model.trainable_variables:
        variable.regularizer = keras.regularizers.L2(1.0)
    assert small.measured(hessian_trace).value == pytest.approx(expected, rel=1e-6)
    assert all(v.regularizer for v in small.model.trainable_variables)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was(rng, training):
    net = Net("dense_batch_norm", rng)
    stack = [*net.model.layers[:-1], layers.Dropout(0.5, seed=1), net.model.layers[-1]]
    model = keras.Sequential([keras.Input(FLAT), *stack])
    model.compile("adam", net.model.loss)
    model.fit(net.x, net.y, verbose=0)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [numpy(v).copy() for v in variables]
    state = np.random.get_state()[1].copy()
    for measure in MEASURES:
        measure(model, net.x, net.y, training=training, num_examples=12, num_trials=2)
    for variable, value in zip(variables, before):
        np.testing.assert_array_equal(numpy(variable), value)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_frozen_weights_have_no_part(small):
    small.model.layers[0].trainable = False
    found = small.measured(hessian_spectral_radius, tolerance=1e-4)
    free = slice(sum(small.sizes[:2]), None)
    expected = np.linalg.eigvalsh(small.hessian[free, free])
    assert found.value == pytest.approx(np.abs(expected).max(), rel=0.01)


def test_half_precision_policy_measures_in_float32(unchanged):
    expected = unchanged.measured(hessian_spectral_radius).value
    half = keras.Sequential.from_config(_with_policy(unchanged.model.get_config(), "mixed_float16"))
    half.compile("sgd", unchanged.model.loss)
    half.set_weights(unchanged.model.get_weights())
    found = hessian_spectral_radius(half, unchanged.x, unchanged.y, seed=0)
    assert found.value == pytest.approx(expected, rel=1e-4)


def _with_policy(config, policy):
    for layer in config["layers"]:
        if "epsilon" in layer["config"] or "units" in layer["config"]:
            layer["config"]["dtype"] = policy
    return config


def test_run_eagerly(small):
    expected = small.measured(hessian_trace, num_products=6).value
    small.model.compile("sgd", small.model.loss, run_eagerly=True)
    assert small.measured(hessian_trace, num_products=6).value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_mirrored_strategy_gives_the_same(mirrored, unchanged):
    with mirrored.scope():
        model = keras.models.clone_model(unchanged.model)
        model.compile("sgd", unchanged.model.loss)
    model.set_weights(unchanged.model.get_weights())
    settings = {"num_products": 6, "chunk_size": 5, "seed": 0}
    found = hessian_trace(model, unchanged.x, unchanged.y, **settings)
    expected = hessian_trace(unchanged.model, unchanged.x, unchanged.y, **settings)
    assert found.value == pytest.approx(expected.value, rel=1e-5)


@only_on("jax", reason="`keras.distribution` is JAX's")
def test_data_parallelism_gives_the_same(small):
    settings = {"num_products": 6, "chunk_size": 5, "seed": 0}
    expected = hessian_trace(small.model, small.x, small.y, **settings)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        model = keras.models.clone_model(small.model)
        model.compile("sgd", small.model.loss)
        model.set_weights(small.model.get_weights())
        found = hessian_trace(model, small.x, small.y, **settings)
    finally:
        keras.distribution.set_distribution(None)
    assert found.value == pytest.approx(expected.value, rel=1e-5)


@only_on("torch", reason="the other library measures torch modules")
@pytest.mark.parametrize("name", ["dense_batch_norm", "layer_norm"])
def test_curvlinops_says_the_same(name, rng):
    """Of a torch module of the same weights."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    import torch

    net = Net(name, rng)
    norm = torch.nn.LayerNorm if name == "layer_norm" else torch.nn.BatchNorm1d
    module = torch.nn.Sequential(
        torch.nn.Linear(5, 4), norm(4, eps=1e-3), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).eval()
    numbers = [torch.tensor(w.T, dtype=torch.float32) for w in [*net.weights, *net.moments]]
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.ndim)]
    for tensor, number in zip(tensors, numbers):
        tensor.data.copy_(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own affair
        operator = curvlinops.HessianLinearOperator(
            module,
            torch.nn.CrossEntropyLoss(),
            list(module.parameters()),
            [(torch.tensor(net.x), torch.tensor(net.y))],
        )
        columns = torch.eye(sum(net.sizes))
        hessian = np.array([numpy(operator @ column) for column in columns])
    found = net.measured(hessian_top_eigenvalues, num_eigenvalues=3, tolerance=1e-4)
    eigenvalues = np.linalg.eigvalsh(hessian)
    expected = eigenvalues[np.argsort(-np.abs(eigenvalues))][:3]
    # Both in float32, the error bound of ours being 1e-4 of the largest.
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-3)
    trace = net.measured(hessian_trace, num_products=60)
    assert trace.value == pytest.approx(np.trace(hessian), abs=3 * trace.stderr)


# ---------------------------------------------------------------- errors and messages


@pytest.mark.parametrize(
    ("measure", "settings", "message"),
    [
        (hessian_trace, {"method": "exact"}, "`method` must be one of 'hutchinson', 'hutch"),
        (hessian_trace, {"num_products": 5}, "`num_products` must be an integer of at least 6"),
        (hessian_frobenius_norm, {"num_products": 5}, "`num_products` must be an integer of at le"),
        (hessian_trace, {"chunk_size": 0}, "`chunk_size` must be an integer of at least 1"),
        (hessian_trace, {"num_examples": 0}, "`num_examples` must be an integer of at least 1"),
        (hessian_trace, {"num_examples": 25}, "`num_examples` must not exceed .*25, 24 examples"),
        (hessian_trace, {"num_trials": 0}, "`num_trials` must be an integer of at least 1"),
        (hessian_trace, {"seed": -1}, "`seed` must be an integer of at least 0"),
        (hessian_trace, {"training": 1}, "`training` must be `True` or `False`"),
        (hessian_trace, {"verbose": 2}, "`verbose` must be one of 0, 1"),
        (hessian_spectral_radius, {"tolerance": 0.0}, "`tolerance` must be a finite number gr"),
        (hessian_spectral_radius, {"max_products": 0}, "`max_products` must be an integer of at l"),
        (hessian_top_eigenvalues, {"num_eigenvalues": 0}, "`num_eigenvalues` must be an integer"),
        (hessian_top_eigenvalues, {"num_eigenvalues": 999}, "`num_eigenvalues` must not exceed"),
        (hessian_spectral_density, {"num_steps": 0}, "`num_steps` must be an integer of at least"),
        (hessian_spectral_density, {"width": -1.0}, "`width` must be a finite number greater"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(unchanged, measure, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(unchanged.model, unchanged.x, unchanged.y, **settings)


def test_models_that_cannot_be_measured(small):
    x, y = small.x, small.y
    with pytest.raises(TypeError, match="`model` must be"):
        hessian_trace(layers.Dense(3), x, y)
    with pytest.raises(ValueError, match="must be compiled with a loss"):
        hessian_trace(keras.Sequential([layers.Dense(3)]), x, y)
    unbuilt = keras.Sequential([layers.Dense(3)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be built"):
        hessian_trace(unbuilt, x, y)
    small.model.compile("sgd", keras.losses.CategoricalCrossentropy(reduction="sum"))
    with pytest.raises(ValueError, match="must be a mean over the examples"):
        hessian_trace(small.model, x, y)


def test_data_that_cannot_be_measured(unchanged):
    x, y = unchanged.x, unchanged.y
    for data, message in [
        ((x, None), None),
        ((iter([(x, y)]), None), "read to their end, several times"),
        ((np.full_like(x, np.nan), y), "`x` must be finite"),
        ((x, np.full_like(y, np.nan)), "`y` must be finite"),
        ((x, y[:3]), "the same number of examples"),
        ((x[:0], y[:0]), "must not be empty"),
        (([], None), "must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message or "Labels are needed"):
            hessian_trace(unchanged.model, *data)
    with pytest.raises(TypeError, match="`x` must be an array"):
        hessian_trace(unchanged.model, 3)


@only_on("tensorflow", reason="of tf.data")
def test_endless_data_are_refused(unchanged):
    import tensorflow as tf

    endless = tf.data.Dataset.from_tensor_slices((unchanged.x, unchanged.y)).batch(4).repeat()
    with pytest.raises(ValueError, match="endless data"):
        hessian_trace(unchanged.model, endless)


def test_start_is_never_orthogonal_to_all_that_there_is():
    """Signs would be, to the rows of equal features, one time in two."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    ones = np.ones((4, 1), "float32")
    values = [
        hessian_top_eigenvalues(model, ones, ones, num_eigenvalues=1, seed=s).value
        for s in range(5)
    ]
    np.testing.assert_allclose(values, 4, rtol=1e-5)


@pytest.mark.slow
def test_half_precision_weights_are_summed_in_float32():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, dtype="bfloat16")])
    model.compile("sgd", "mse")
    ones = np.ones((1000, 1), "float32")
    # bfloat16 holds 4 and the entries 2 of the Hessian; its sums would stop at some 500.
    found = hessian_trace(model, ones, ones, chunk_size=1, num_products=6, seed=0)
    assert found.value == pytest.approx(4, rel=0.02)


@only_on("torch", "jax", reason="needs torch")
def test_random_state_is_left_as_it_was_by_a_loader(small):
    import torch

    pairs = torch.utils.data.TensorDataset(torch.tensor(small.x), torch.tensor(small.y))
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True)
    for num_examples in (None, 6):
        hessian_trace(small.model, loader, num_examples=num_examples, num_trials=2)
        assert torch.equal(torch.get_rng_state(), before)


def test_eigenvalues_that_have_not_converged_are_reported(unchanged):
    with pytest.warns(UserWarning, match="have not converged.*max_products=2"):
        unchanged.measured(hessian_spectral_radius, max_products=2)


def test_weights_that_are_not_finite_give_nan(small):
    small.model.layers[0].kernel.assign(np.full((5, 4), np.nan))
    for measure in MEASURES:
        assert np.isnan(small.measured(measure).value)
    assert np.isnan(small.measured(hessian_spectral_density, num_steps=3).value).all()


def test_progress_bar_counts_the_products(unchanged, capsys):
    unchanged.measured(hessian_trace, num_products=6, verbose=1)
    assert "6/6" in capsys.readouterr().out
    unchanged.measured(hessian_trace, num_products=6)
    assert capsys.readouterr().out == ""
    unchanged.measured(hessian_spectral_radius, verbose=1)
    assert capsys.readouterr().out.endswith("\n")
