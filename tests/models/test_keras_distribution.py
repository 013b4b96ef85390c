"""Training under `keras.distribution`, on four CPU devices."""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from keras_infomcr import GammaHatCallback, RegularizedModel, StartRegAfterLRDrop
from keras_infomcr.regularizers import SubBatchPerturbation

if BACKEND != "jax":
    pytest.skip("`keras.distribution` works on JAX alone.", allow_module_level=True)

import jax

BETA = 1.0

draw = np.random.default_rng(0)
X, Y, WEIGHTS = draw.normal(size=(48, 8)), draw.normal(size=(48, 4)), draw.uniform(0.2, 3, 48)


def data_parallel():
    return keras.distribution.DataParallel()


def model_parallel():
    """Return two replicas of a model that is cut in two."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["hidden/kernel"] = (None, "model")
    layouts["hidden/bias"] = ("model",)
    layouts["hidden$"] = ("batch", "model")  # of the layer's outputs
    layouts["output/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


@pytest.fixture(params=[data_parallel, model_parallel])
def distribution(request):
    yield request.param
    keras.distribution.set_distribution(None)


def network(*layers):
    penalty = keras.regularizers.L2(1 / 64)
    inputs = keras.Input((8,))
    x = keras.layers.Dense(16, "tanh", kernel_regularizer=penalty, name="hidden")(inputs)
    for layer in layers:
        x = layer(x)
    return inputs, keras.layers.Dense(4, name="output")(x)


def normalized():
    return network(keras.layers.BatchNormalization())


def compiled(distribution=None, base=RegularizedModel, outputs=network, beta=BETA, **kwargs):
    """Return a compiled model; `kwargs` are the regulariser's."""
    keras.distribution.set_distribution(distribution and distribution())
    keras.utils.set_random_seed(0)
    model = base(*outputs())
    regularizer = {}
    if base is RegularizedModel:
        kwargs = {"num_sub_batches": 8} | kwargs
        regularizer = {"regularizer": SubBatchPerturbation(0.05, beta, **kwargs)}
    optimizer = keras.optimizers.SGD(1 / 8, momentum=0.5)
    model.compile(optimizer, "mse", weighted_metrics=["mae"], **regularizer)
    return model


def train(*args, callbacks=None, epochs=1, batch_size=16, **kwargs):
    model = compiled(*args, **kwargs)
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "epochs": epochs}
    logs = model.fit(X, Y, sample_weight=WEIGHTS, callbacks=callbacks, **options).history
    return model, logs


def flat(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def assert_same(model, expected):
    """Compare in float64, where sums in another order are 1e-16 of a weight, many times."""
    norm = np.linalg.norm(flat(expected))
    np.testing.assert_allclose(flat(model), flat(expected), rtol=0, atol=1e-12 * norm)


@pytest.mark.parametrize(
    ("outputs", "kwargs"),
    [
        (network, {"main_gradient": "sub_batches"}),
        (normalized, {"main_gradient": "full_batch"}),
        (network, {"estimator": "hessian_vector_product"}),
        pytest.param(normalized, {"main_gradient": "sub_batches"}, marks=pytest.mark.slow),
        pytest.param(network, {"main_gradient": "full_batch"}, marks=pytest.mark.slow),
    ],
)
def test_update_equals_that_of_one_device(distribution, float64, outputs, kwargs):
    expected, expected_logs = train(outputs=outputs, **kwargs)
    plain, _ = train(base=keras.Model, outputs=outputs)
    model, logs = train(distribution, outputs=outputs, **kwargs)
    contribution = np.linalg.norm(flat(plain) - flat(expected))
    # The contribution is some tenths of the weights: sums in another order are 1e-14 of it, and
    # some hundred times that where three steps normalise slices of two examples.
    assert np.linalg.norm(flat(model) - flat(expected)) <= 1e-11 * contribution
    np.testing.assert_allclose(list(logs.values()), list(expected_logs.values()), rtol=1e-11)


@pytest.mark.parametrize("distribution", [data_parallel], indirect=True)
def test_update_equals_that_of_one_device_in_float32(distribution):
    expected, _ = train()
    model, _ = train(distribution)
    # Float32 rounds a weight by 6e-8 of it. Three steps with momentum round a dozen times.
    assert np.linalg.norm(flat(model) - flat(expected)) <= 1e-6 * np.linalg.norm(flat(expected))


@pytest.mark.parametrize("distribution", [data_parallel], indirect=True)
def test_slices_of_uneven_sizes_are_those_of_one_device(distribution, float64):
    """Batches of 12 are cut into slices of 1 and 2 examples."""
    expected, _ = train(batch_size=12)
    model, _ = train(distribution, batch_size=12)
    assert_same(model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [model_parallel], indirect=True)
def test_without_compilation(float64, distribution):
    expected, _ = train()
    model = compiled(distribution)
    model.run_eagerly = True
    model.fit(X, Y, sample_weight=WEIGHTS, batch_size=16, shuffle=False, verbose=0)
    assert_same(model, expected)


@pytest.mark.parametrize("distribution", [data_parallel], indirect=True)
def test_each_replica_takes_as_many_sub_batches(distribution, float64):
    with pytest.warns(UserWarning, match="`num_sub_batches=3` is not divisible by 4 .* 4 in total"):
        model, _ = train(distribution, num_sub_batches=3)
    expected, _ = train(num_sub_batches=4)
    assert_same(model, expected)


def test_mean_over_drawn_sub_batches_is_that_of_all(float64):
    """At a learning rate of 0 the weights stay; an epoch is one step and logs one draw."""

    def values(**kwargs):
        model = compiled(data_parallel, **kwargs)
        model.optimizer.learning_rate = 0.0
        options = {"batch_size": 48, "shuffle": False, "verbose": 0, "epochs": 8}
        return model.fit(X, Y, **options).history["infomcr_reg"]

    try:
        drawn = np.unique(np.round(values(num_perturbed=4), 12))
        assert len(drawn) == 2  # of the two slices of each replica one or the other
        np.testing.assert_allclose(np.mean(drawn), values()[0], rtol=1e-10)
    finally:
        keras.distribution.set_distribution(None)


@pytest.mark.filterwarnings("ignore:The loss is no cross-entropy:UserWarning")
def test_gate_opens_and_gamma_hat_is_that_of_one_device(distribution, float64):
    def callbacks():
        lower = keras.callbacks.LearningRateScheduler(lambda epoch: [1 / 8, 1 / 16][epoch])
        gamma_hat = GammaHatCallback((X, Y), num_examples=8, num_trials=3)
        return [lower, StartRegAfterLRDrop(), gamma_hat]

    _, expected = train(epochs=2, callbacks=callbacks())
    _, logs = train(distribution, epochs=2, callbacks=callbacks())
    assert np.isnan(logs["infomcr_reg"][0])
    for name, values in logs.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-10, err_msg=name)


def program(model):
    """Return the compiled step of a model on a batch of 16."""
    model.train_on_batch(X[:16], Y[:16])
    batch = [
        jax.device_put(a, keras.distribution.distribution().get_data_layout(a.shape).backend_layout)
        for a in (X[:16].astype("float32"), Y[:16].astype("float32"))
    ]
    state = tuple(
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    shardings = jax.tree.map(lambda a: a.sharding, state)
    step = jax.jit(model.train_step, out_shardings=(None, shardings), donate_argnums=0)
    return step.lower(state, tuple(batch)).compile().as_text()


def collectives(text):
    """Return the kinds of the collectives of a program and the number of elements of each."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text)
    sizes = [
        sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)
        for shapes in (re.findall(r"[fsup]\w*\[([\d,]*)\]", result) for result, _ in found)
    ]
    return [kind for _, kind in found], sizes


@pytest.mark.parametrize("outputs", [network, normalized])
def test_step_communicates_as_often_as_a_plain_one(outputs):
    """The regulariser sums one more number over the devices, its value, and moves no data."""
    try:
        plain = program(compiled(data_parallel, keras.Model, outputs))
        model = compiled(data_parallel, outputs=outputs)
        text = program(model)
    finally:
        keras.distribution.set_distribution(None)
    kinds, sizes = collectives(text)
    plain_kinds, plain_sizes = collectives(plain)
    assert kinds == plain_kinds and set(kinds) == {"all-reduce"}
    # XLA for CPUs sums the gradients of the full batch and of the regulariser separately.
    gradients = 0 if outputs is network else model.count_params()
    assert sum(sizes) <= sum(plain_sizes) + gradients + 1


@pytest.mark.parametrize("distribution", [model_parallel], indirect=True)
def test_no_weight_of_a_model_cut_in_two_is_gathered(distribution):
    kinds, _ = collectives(program(compiled(distribution, main_gradient="sub_batches")))
    assert set(kinds) == {"all-reduce"}
