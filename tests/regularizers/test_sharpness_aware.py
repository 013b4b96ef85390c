"""SAM and its family against closed forms."""

import warnings

import keras
import numpy as np
import pytest
from algorithm_1 import flat
from frameworks import BACKEND, array, numpy, only_on

from keras_infomcr import RegularizedModel
from keras_infomcr.core.sub_batch_averages import finite_difference
from keras_infomcr.objective import Batch, Objective
from keras_infomcr.regularizers import SharpnessAware

EAGER = {} if BACKEND == "jax" else {"run_eagerly": True}
CURVATURES = np.array([4.0, 2.0, 1.0, 0.5])


def quadratic(start, curvatures=CURVATURES, rate=0.3, rule=None):
    """Return a model and data whose loss is sum_k curvatures[k] w[k]^2 / 2."""
    n = len(curvatures)
    model = RegularizedModel.from_model(
        keras.Sequential([keras.Input((n,)), keras.layers.Dense(1, use_bias=False)])
    )
    model.compile(keras.optimizers.SGD(rate), "mse", regularizer=rule)
    model.set_weights([np.reshape(start, (n, 1))])
    return model, (array(np.diag(np.sqrt(n / 2 * curvatures))), array(np.zeros((n, 1))))


def small_net(rule, base=RegularizedModel, loss="mse", **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(5, "gelu")(inputs)
    model = base(inputs, keras.layers.Dense(2, bias_initializer="ones")(hidden))
    if base is RegularizedModel:
        kwargs["regularizer"] = rule
    model.compile(keras.optimizers.SGD(1.0), loss, **EAGER, **kwargs)
    return model


def data(rng, size=6):
    return rng.normal(size=(size, 3)), rng.normal(size=(size, 2))


def direction(rule, x, y, **kwargs):
    """Return what one step with the rate 1 moves the weights against."""
    model = small_net(rule, **kwargs)
    before = flat(model.trainable_variables)
    model.train_on_batch(x, y)
    return before - flat(model.trainable_variables)


def test_on_a_quadratic_it_ends_bouncing(float64):
    """At |w_1| = rate rho l / (2 - rate l) along the largest curvature l, and at 0 elsewhere.

    The slowest other coordinate shrinks by 1 - 0.3 * 0.5 a step at most: 0.85^200 = 8e-15.
    """
    model, batch = quadratic([0.3, -0.2, 0.1, 0.4], rule=SharpnessAware(rho=0.05))
    x, y = (np.tile(numpy(a), (200, 1)) for a in batch)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    expected = 0.3 * 0.05 * 4.0 / (2 - 0.3 * 4.0)
    np.testing.assert_allclose(np.abs(flat(model.weights)), [expected, 0, 0, 0], atol=1e-12)


def test_its_edge_of_stability_is_below_plain_training_s(float64):
    """It solves rate l + rate rho l^2 / ||g|| = 2, ||g|| = 0.7 from a coordinate of its own."""
    rate, rho, norm = 0.3, 0.05, 0.7
    edge = norm / (2 * rho) * (np.sqrt(1 + 8 * rho / (rate * norm)) - 1)
    assert edge < 2 / rate
    for factor, grows in ((0.99, False), (1.01, True)):
        curvatures = np.array([1e-3, factor * edge])
        start = [norm / 1e-3, 1e-6]
        model, batch = quadratic(start, curvatures, rate, SharpnessAware(rho))
        model.train_on_batch(*batch)
        assert (abs(flat(model.weights)[1]) > 1e-6) == grows


@pytest.mark.parametrize(("adaptive", "invariant"), [(True, True), (False, False)])
def test_asam_alone_does_not_see_the_scale_of_layers(adaptive, invariant, float64):
    """The sharpness of (a b - 2)^2 / 2 at (c a, b / c), for three c."""
    found = []
    for scale in (1.0, 10.0, 0.01):
        layers = [keras.layers.Dense(1, use_bias=False) for _ in range(2)]
        model = RegularizedModel.from_model(keras.Sequential([keras.Input((1,)), *layers]))
        rule = SharpnessAware(0.1, adaptive=adaptive, eta=0.0)
        model.compile("sgd", "mse", regularizer=rule)
        model.set_weights([np.array([[1.5 * scale]]), np.array([[1 / scale]])])
        batch = Batch(array([[1.0]]), array([[2.0]]))
        found.append(float(numpy(rule(Objective(model), batch, []).value)))
    assert (np.ptp(found) < 1e-10) == invariant


def test_it_is_the_rule_of_the_sub_batches_with_another_step(rng, float64):
    """alpha = -rho / ||g|| and beta = -s, in the core that `SubBatchPerturbation` averages."""
    x, y = data(rng)
    rho, s = 0.3, 0.7
    model = small_net(SharpnessAware(rho, s))
    objective = Objective(model)
    weights, state, batch = objective.weights(), objective.state(), Batch(array(x), array(y))
    g = flat(objective.evaluate(weights, state, batch).gradients)
    alpha = -rho / np.linalg.norm(g)
    found = finite_difference(objective.evaluate, weights, alpha)(0, state, batch)
    expected = g - s * flat(found.gradient)
    np.testing.assert_allclose(direction(model.regularizer, x, y), expected, rtol=0, atol=1e-14)


def test_every_example_a_slice_is_the_mean_of_sam_by_example(rng, float64):
    x, y = data(rng)
    each = [direction(SharpnessAware(0.3), x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    slices = direction(SharpnessAware(0.3, num_sub_batches=len(x)), x, y)
    np.testing.assert_allclose(slices, np.mean(each, axis=0), rtol=0, atol=1e-14)


def test_full_strength_is_the_gradient_uphill_itself(rng):
    """To the bit, though g is 1e8 times larger than it along a direction of the quadratic.

    At (1e8, 1) a step of 1 along g leads near (1e8 + 1, 1): adding g' - g to g would lose 1.
    """
    curvatures = np.array([1.0, 1e-8])
    model, batch = quadratic([1e8, 1.0], curvatures, 1.0, SharpnessAware(16.0))
    objective = Objective(model, float32=False)
    step = model.regularizer(objective, Batch(*(keras.ops.cast(a, "float32") for a in batch)), [])
    before = flat(model.weights)
    model.train_on_batch(*batch)
    expected = before.astype("float32") - flat(step.instead).astype("float32")
    np.testing.assert_array_equal(flat(model.weights), expected)


def test_biases_are_not_scaled_in_the_adaptive_norm(rng, float64):
    """A literal reading with T = |w| + eta for kernels and gamma, 1 for biases and beta."""
    x, y = data(rng)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.LayerNormalization()(keras.layers.Dense(4, "tanh")(inputs))
    model = RegularizedModel(inputs, keras.layers.Dense(2)(hidden))
    model.compile("sgd", "mse", regularizer=SharpnessAware(0.5, adaptive=True, eta=0.1))
    objective, batch = Objective(model), Batch(array(x), array(y))
    step = model.regularizer(objective, batch, [])
    here = objective.evaluate(objective.weights(), objective.state(), batch)
    w, g = ([numpy(a) for a in arrays] for arrays in (objective.weights(), here.gradients))
    kinds = ["kernel", "bias", "gamma", "beta", "kernel", "bias"]
    assert [v.name for v in model.trainable_variables] == kinds
    t = [np.abs(a) + 0.1 if kind in ("kernel", "gamma") else 1.0 for a, kind in zip(w, kinds)]
    norm = np.sqrt(sum(np.sum((a * b) ** 2) for a, b in zip(t, g)))
    moved = [array(a + 0.5 * b**2 * c / norm) for a, b, c in zip(w, t, g)]
    there = objective.evaluate(moved, objective.state(), batch)
    np.testing.assert_allclose(flat(step.instead), flat(there.gradients), rtol=0, atol=1e-14)
    assert float(step.value) == pytest.approx(float(there.loss) - float(here.loss), abs=1e-14)


def test_a_gradient_of_zero_moves_nothing(float64):
    model, batch = quadratic(np.zeros(4), rule=SharpnessAware())
    assert model.train_on_batch(*batch) == 0
    np.testing.assert_array_equal(flat(model.weights), 0)


def test_the_radius_is_live(rng, float64):
    x, y = data(rng)
    model = small_net(SharpnessAware(1e-3))
    start = model.get_weights()
    found = []
    for rho in (1e-3, 0.5):
        model.regularizer.rho = rho
        model.set_weights(start)
        model.train_on_batch(x, y)
        found.append(flat(model.weights))
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert model.regularizer.get_config()["rho"] == 0.5
    with pytest.raises(ValueError, match="`rho` must be a finite number greater than 0"):
        model.regularizer.rho = 0.0


@pytest.mark.parametrize(
    "policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)]
)
def test_half_precision_follows_float32_as_plain_keras_does(policy):
    """A step differs from float32's by at most twice what a plain step does, for four batches.

    The gradient uphill is rounded as the plain one, and where it is taken follows a rounded
    direction: two errors. Gradients of 1e-6 vanish in float16 unless the loss is scaled.
    """
    errors, effects = {None: [], SharpnessAware: []}, []
    for seed in range(4):
        x, y = (a.astype("float32") for a in data(np.random.default_rng(seed), 32))
        plain, ours = ({}, {})
        for steps, rule, base in ((plain, None, keras.Model), (ours, SharpnessAware, None)):
            for precision in ("float32", policy):
                keras.config.set_dtype_policy(precision)
                made = rule and rule(0.5)
                kwargs = {"base": base or RegularizedModel, "loss": _tiny_mean_squared_error}
                steps[precision] = direction(made, x, y, **kwargs)
            errors[rule].append(np.linalg.norm(steps[policy] - steps["float32"]))
            errors[rule][-1] /= np.linalg.norm(steps["float32"])
        change = ours["float32"] - plain["float32"]
        effects.append(np.linalg.norm(change) / np.linalg.norm(plain["float32"]))
    assert min(effects) > 0.05
    assert np.linalg.norm(errors[SharpnessAware]) < 2 * np.linalg.norm(errors[None])


def _tiny_mean_squared_error(y_true, y_pred):
    difference = keras.ops.cast(y_pred, "float32") - keras.ops.cast(y_true, "float32")
    return 1e-3 * keras.ops.mean(keras.ops.square(difference), axis=-1)


def test_a_step_that_overflows_is_skipped_and_not_remembered(rng):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = (a.astype("float32") for a in data(rng))
    model = small_net(SharpnessAware(direction="noise"), metrics=["mae"])
    model.train_on_batch(x, y)
    before = model.get_weights()
    mean = [numpy(v) for v in model.regularizer.memory]
    model.train_on_batch(1e5 * x, y)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.regularizer.memory, mean):
        np.testing.assert_array_equal(numpy(a), b)


def test_gradients_of_nan_are_followed_as_by_plain_keras(rng):
    """One weight is NaN in both, no more, with one warning."""
    x, y = (a.astype("float32") for a in data(rng))
    y[0, 1] = np.nan
    found = []
    for rule, base in ((None, keras.Model), (SharpnessAware(), RegularizedModel)):
        model = small_net(rule, base=base)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y, epochs=1, verbose=0)
        found.append(flat(model.weights))
        ours = [w for w in caught if "not finite" in str(w.message)]
        assert len(ours) == (rule is not None)
    np.testing.assert_array_equal(np.isnan(found[0]), np.isnan(found[1]))
    assert np.isnan(found[0]).any()


def test_weights_of_half_precision_are_refused_by_the_adaptive_norm(rng):
    keras.config.set_dtype_policy("bfloat16")
    x, y = data(rng)
    model = small_net(SharpnessAware(adaptive=True))
    with pytest.raises(ValueError, match=r"`adaptive=True`.*Received: half-precision weights"):
        model.train_on_batch(x, y)
    small_net(SharpnessAware()).train_on_batch(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0}, r"`rho` must be a finite number greater than 0\. Received: rho=0"),
        ({"rho": np.nan}, "`rho` must be"),
        ({"strength": -1.0}, "`strength` must be a finite number, 0 or greater"),
        ({"adaptive": 1}, "`adaptive` must be `True` or `False`"),
        ({"eta": -0.1}, "`eta` must be"),
        ({"num_sub_batches": 0}, "`num_sub_batches` must be an integer of at least 1"),
        ({"direction": "up"}, "`direction` must be one of 'gradient', 'noise'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessAware(**arguments)


def test_slices_need_a_loss_that_is_a_mean():
    model = small_net(None)
    with pytest.raises(ValueError, match=r"mean over.*Received: num_sub_batches=2 and loss"):
        model.compile(
            "sgd",
            keras.losses.MeanSquaredError(reduction="sum"),
            regularizer=SharpnessAware(num_sub_batches=2),
        )


def test_layers_that_assign_their_weights_are_refused():
    layers = [keras.Input((3,)), keras.layers.SpectralNormalization(keras.layers.Dense(2))]
    model = RegularizedModel.from_model(keras.Sequential(layers))
    model.compile("sgd", "mse", regularizer=SharpnessAware())
    if BACKEND == "jax":
        pytest.skip("Keras's own training step on JAX drops what is assigned to weights, too.")
    with pytest.raises(ValueError, match=r"assign.*Received: a SharpnessAware.*kernel"):
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))


@only_on("torch", reason="other frameworks have no modules of torch")
def test_buffers_of_torch_modules_move_once_a_step(rng):
    """Keras makes the pass over the batch then, and the rule adds its difference."""
    import torch

    x = rng.normal(size=(8, 3)).astype("float32")
    norm = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(3))
    model = RegularizedModel.from_model(keras.Sequential([norm, keras.layers.Dense(2)]))
    model.compile("sgd", "mse", regularizer=SharpnessAware())
    model.train_on_batch(x, np.ones((8, 2)))
    mean = norm.module.running_mean.cpu().numpy()
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=0), rtol=1e-5)
