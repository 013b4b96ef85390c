import json
import shutil
import types

import keras
import numpy as np
import pytest
from frameworks import BACKEND, array, numpy, only_on, tensorflow
from images import load, normalize
from networks import NETWORKS, layers

from keras_infomcr.flatness import gamma_hat

tensorflow()
import evaluate_gamma  # noqa: E402
import run_folder  # noqa: E402
import train_cifar10  # noqa: E402
import training_settings  # noqa: E402


@pytest.fixture
def data(tmp_path, rng):
    """Return the path of a file of small images in four classes, each of a colour."""
    arrays = {}
    for split, number in {"train": 128, "test": 32}.items():
        y = np.arange(number) % 4
        colours = np.array([[200, 50, 50], [50, 200, 50], [50, 50, 200], [150, 150, 50]])
        x = colours[y][:, np.newaxis, np.newaxis] + rng.integers(-50, 51, size=(number, 8, 8, 3))
        arrays |= {f"x_{split}": x.astype("uint8"), f"y_{split}": y}
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def tiny(input_shape, num_classes, l2=2.5e-4):
    """Return a network of one convolution: it compiles soon, and the scripts see no difference."""
    inputs = keras.Input(input_shape)
    x = layers.batch_norm(layers.conv(inputs, 16, 3, l2=l2, fan="fan_in"), l2=l2)
    initializer = layers.he_normal("fan_in")
    return inputs, layers.logits(layers.relu(x), num_classes, l2=l2, initializer=initializer)


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """Return the arguments of a short run into the folder `tmp_path/name`."""
    monkeypatch.setitem(NETWORKS, "tiny", tiny)

    def make(name, *options):
        return [
            *("--data", str(data), "--network", "tiny", "--batch-size", "32"),
            *("--learning-rates", "0.01", "0.005", "--boundaries", "1", "--epochs", "4"),
            *("--num-sub-batches", "2", "--checkpoint-every", "2", "--verbose", "0"),
            *("--output", str(tmp_path / name), *options),
        ]

    return make


def weights(path):
    return [numpy(w) for w in keras.saving.load_model(path).trainable_variables]


def interrupt(monkeypatch, epoch):
    """Interrupt runs at the end of an epoch, counted from 1, before its checkpoint."""
    on_epoch_end = run_folder.Checkpoint.on_epoch_end

    def raise_then(self, at, logs=None):
        if at + 1 == epoch:
            raise KeyboardInterrupt
        on_epoch_end(self, at, logs)

    monkeypatch.setattr(run_folder.Checkpoint, "on_epoch_end", raise_then)


# Keras's CSVLogger leaves its file open where an exception ends `fit`.
interrupted = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def assert_same_end(tmp_path, *names):
    a, b = (weights(tmp_path / name / "epoch-004.keras") for name in names)
    for one, other in zip(a, b):
        # Sums in another order by threads: some units of the last place of weights around 0.1.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@interrupted
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(command, tmp_path, monkeypatch):
    # The gate depends on what was before the interruption: the drop of the learning rate.
    options = ["--regularize", "after-drop", "--gamma-every", "2", "--gamma-trials", "2"]
    options += ["--evaluate-every", "2"]
    train_cifar10.main(command("whole", *options))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        train_cifar10.main(command("broken", *options))
    broken = tmp_path / "broken"
    assert sorted(p.name for p in broken.glob("*.keras")) == ["epoch-002.keras"]
    assert len((broken / "log.csv").read_text().splitlines()) == 1 + 3
    train_cifar10.main(command("broken", *options, "--resume"))

    assert_same_end(tmp_path, "whole", "broken")
    logs = [run_folder.read(tmp_path / name / "log.csv") for name in ("whole", "broken")]
    assert [row["epoch"] for row in logs[1]] == [0, 1, 2, 3]
    for a, b in zip(*logs):
        for key in ("loss", "infomcr_reg", "gamma_hat", "learning_rate"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3)
    assert [np.isfinite(row["infomcr_reg"]) for row in logs[1]] == [False, True, True, True]
    # The first epoch after the interruption is evaluated too.
    assert [np.isfinite(row["val_loss"]) for row in logs[0]] == [True, True, False, True]
    assert [np.isfinite(row["val_loss"]) for row in logs[1]] == [True, True, True, True]


@pytest.mark.slow
@interrupted
@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "mixed_float16"],
        pytest.param(
            ["--jit", "on"],
            marks=only_on("tensorflow", "jax", reason="torch.compile takes minutes here"),
        ),
        ["--keras-cv"],
    ],
    ids=lambda options: options[0],
)
def test_runs_of_all_kinds_resume_more_than_once(options, command, tmp_path, monkeypatch):
    if "--keras-cv" in options:
        pytest.importorskip("keras_cv", reason="the extra cv is not installed")
    train_cifar10.main(command("whole", *options))
    for epoch in (1, 4):  # before the first checkpoint, and before the last
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, epoch)
            train_cifar10.main(command("broken", *options, "--resume"))
    train_cifar10.main(command("broken", *options, "--resume"))
    assert_same_end(tmp_path, "whole", "broken")
    log = run_folder.read(tmp_path / "broken/log.csv")
    assert [row["epoch"] for row in log] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_last_checkpoint_is_that_of_the_latest_epoch(command, data, tmp_path):
    arguments = command("run", "--regularize", "never", "--epochs", "1", "--boundaries", "1")
    train_cifar10.main(arguments)
    for epoch in (999, 1000):
        shutil.copy(tmp_path / "run/epoch-001.keras", tmp_path / f"run/epoch-{epoch:03d}.keras")
    settings = training_settings.parse([*arguments, "--resume"])
    assert run_folder.prepare(settings, train_cifar10.make_model(settings, load(data))) == 1000


@pytest.mark.slow
def test_a_run_that_failed_to_begin_leaves_its_folder_free(command):
    options = ["--regularize", "never", "--epochs", "1"]
    with pytest.raises(ValueError, match="`batch_size` must be at most"):
        train_cifar10.main(command("run", *options, "--batch-size", "500"))
    train_cifar10.main(command("run", *options))


@pytest.mark.slow
def test_a_diverged_run_is_reported(command, tmp_path, capsys):
    options = ["--regularize", "never", "--learning-rates", "1e30", "1e30", "--epochs", "2"]
    train_cifar10.main(command("run", *options))
    results = json.loads((tmp_path / "run/results.json").read_text())["results"]
    assert results["test_cross_entropy"] is None
    assert (tmp_path / "run/curves.png").exists()
    assert "test_cross_entropy   nan" in capsys.readouterr().out


@pytest.mark.slow
def test_results_are_those_of_the_last_checkpoint(command, data, tmp_path, capsys):
    train_cifar10.main(command("run", "--gamma-every", "3", "--gamma-trials", "2"))
    report = json.loads((tmp_path / "run/results.json").read_text())
    assert report["settings"]["network"] == "tiny"
    assert report["versions"]["keras"] == keras.__version__
    assert BACKEND in report["versions"]
    assert (tmp_path / "run/curves.png").stat().st_size > 0

    images = load(data)
    model = keras.saving.load_model(tmp_path / "run/epoch-004.keras")
    x, y = normalize(images.x_test), images.y_test
    logits = numpy(model(array(x))).astype("float64")
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    results = report["results"]
    assert results["test_accuracy"] == pytest.approx((logits.argmax(axis=1) == y).mean())
    assert results["test_accuracy"] > 0.5  # four colours; chance is 0.25
    # The penalty of the weights, some 0.05, is not in it. Float32.
    assert results["test_cross_entropy"] == pytest.approx(losses.mean(), rel=1e-4, abs=1e-5)
    measured = gamma_hat(model, normalize(images.x_train), images.y_train, num_trials=2, seed=0)
    assert results["gamma_hat"] == pytest.approx(measured.value, rel=1e-3)
    assert "gamma_hat" in capsys.readouterr().out


def gate(pattern, epoch):
    settings = types.SimpleNamespace(regularize=pattern, boundaries=[60, 120, 160])
    callback = train_cifar10.RegularizeSegments(settings)
    callback.set_model(types.SimpleNamespace(regularizer_active=None))
    callback.on_epoch_begin(epoch)
    return callback.model.regularizer_active


@pytest.mark.parametrize("pattern", training_settings.SEGMENTS)
def test_patterns_regularise_the_segments_of_the_infomcr_code(pattern):
    # [0, 60), [60, 120), [120, 200], in epochs from 0.
    for digit, epochs in zip(pattern, [(0, 59), (60, 119), (120, 160, 199)]):
        assert [gate(pattern, epoch) for epoch in epochs] == [digit == "1"] * len(epochs)


def test_boundaries_scale_with_the_epochs():
    assert training_settings.parse([]).boundaries == [60, 120, 160]
    assert training_settings.parse(["--epochs", "20"]).boundaries == [6, 12, 16]
    assert training_settings.parse(["--epochs", "2"]).boundaries == [1, 1, 2]


def test_settings_reach_the_model(tmp_path, data):
    settings = training_settings.parse(
        [
            *("--alpha", "0.5", "--beta", "3", "--num-sub-batches", "4"),
            *("--main-gradient", "full_batch", "--l2", "0.25", "--jit", "off"),
        ]
    )
    model = train_cifar10.make_model(settings, load(data))
    assert model.output_shape == (None, 4)
    assert (
        model.regularizer.get_config()
        | {
            "alpha": 0.5,
            "beta": 3.0,
            "num_sub_batches": 4,
            "main_gradient": "full_batch",
        }
        == model.regularizer.get_config()
    )
    assert model.layers[1].kernel_regularizer.l2 == 0.25
    assert model.jit_compile is False


def test_never_is_a_plain_network(data):
    model = train_cifar10.make_model(training_settings.parse(["--regularize", "never"]), load(data))
    assert model.regularizer is None


@pytest.mark.slow
def test_a_folder_is_not_written_over(command):
    train_cifar10.main(command("run", "--epochs", "1", "--regularize", "never"))
    with pytest.raises(SystemExit, match=r"must not hold a run.*--resume.*Received: --output"):
        train_cifar10.main(command("run", "--epochs", "1", "--regularize", "never"))
    with pytest.raises(SystemExit, match=r"own settings. Received: seed=5 \(the run: 0\)"):
        train_cifar10.main(
            command("run", "--epochs", "1", "--regularize", "never", "--resume", "--seed", "5")
        )


@pytest.mark.slow
def test_a_finished_run_may_be_resumed(command, tmp_path):
    arguments = command("run", "--epochs", "1", "--regularize", "never")
    train_cifar10.main(arguments)
    before = (tmp_path / "run/results.json").read_text()
    train_cifar10.main([*arguments, "--resume"])
    assert (tmp_path / "run/results.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be an integer of at least 1. Received: 0"),
        (["--learning-rates", "0.1"], "one more than --boundaries. Received: [0.1] and [60"),
        (["--boundaries", "9", "5", "7"], "must not decrease. Received: [9, 5, 7]"),
        (["--epochs", "1"], "an epoch to regularise. Received: --regularize 011, --epochs 1, --b"),
        (["--epochs", "1"], "Take more epochs, or pass --regularize 111 to regularise all of them"),
        (
            ["--epochs", "1", "--regularize", "after-drop"],
            "Received: --regularize after-drop, --ep",
        ),
        (["--network", "resnet-21"], "invalid choice: 'resnet-21'"),
    ],
)
def test_wrong_settings_get_clear_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training_settings.parse(arguments)
    assert message in capsys.readouterr().err


def test_one_epoch_can_be_regularised_from_its_first_step_or_never():
    for rule in ("111", "100", "never"):
        assert training_settings.parse(["--epochs", "1", "--regularize", rule]).epochs == 1


@pytest.mark.parametrize("script", [train_cifar10, evaluate_gamma])
def test_data_that_cannot_be_read_end_a_script_with_a_line(script, data, tmp_path):
    models = [str(data)] if script is evaluate_gamma else ["--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"--data nowhere.npz: .* which is no file"):
        script.main([*models, "--data", "nowhere.npz"])
    with pytest.raises(SystemExit, match=r"`num_train` must be from 1 to 128, .* num_train=500"):
        script.main([*models, "--data", str(data), "--num-train", "500"])
    assert not (tmp_path / "run").exists()


def test_more_examples_than_images_end_the_comparison_with_a_line(data):
    message = r"Received: --num-examples 129, 128 images\. Pass --num-examples 128\."
    with pytest.raises(SystemExit, match=message):
        evaluate_gamma.main([str(data), "--data", str(data), "--num-examples", "129"])


def test_a_file_that_is_no_model_ends_the_comparison_with_a_line(data):
    with pytest.raises(SystemExit, match=r"data\.npz could not be loaded as a model: "):
        evaluate_gamma.main([str(data), "--data", str(data)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.keras"],
            "models must be .keras files. Received: nowhere.keras, which is no file",
        ),
        ([__file__, "--scale", "0"], "must be a number greater than 0. Received: 0"),
        ([__file__, "--scale", "a"], "must be a number greater than 0. Received: a"),
        ([__file__, "--num-trials", "0"], "must be an integer of at least 1. Received: 0"),
    ],
)
def test_wrong_settings_of_the_comparison_get_clear_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate_gamma.parse(arguments)
    assert message in capsys.readouterr().err


@only_on("jax", "torch", reason="TensorFlow has it")
def test_mirrored_strategy_needs_tensorflow(capsys):
    with pytest.raises(SystemExit):
        training_settings.parse(["--strategy", "mirrored"])
    assert f"needs the TensorFlow backend. Received: KERAS_BACKEND={BACKEND}" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
@interrupted
def test_mirrored_strategy_trains_and_resumes(mirrored, command, tmp_path, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: mirrored)
    options = ["--strategy", "mirrored"]
    train_cifar10.main(command("whole", *options))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        train_cifar10.main(command("broken", *options))
    train_cifar10.main(command("broken", *options, "--resume"))
    assert_same_end(tmp_path, "whole", "broken")


@pytest.mark.slow
def test_models_are_compared_side_by_side(command, data, tmp_path, capsys):
    paths = []
    for rule in ("never", "111"):
        train_cifar10.main(command(rule, "--epochs", "1", "--regularize", rule))
        paths.append(str(tmp_path / rule / "epoch-001.keras"))
    capsys.readouterr()
    options = {"num_examples": 20, "num_trials": 3, "seed": 1}
    evaluate_gamma.main(
        [
            *(*paths, "--data", str(data), "--num-train", "40"),
            *("--num-examples", "20", "--num-trials", "3", "--seed", "1", "--scale", "0.1"),
        ]
    )
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ("model test accuracy gamma-hat normalised paper's code".split())
    images = load(data, 40)
    x, y = normalize(images.x_train), images.y_train
    for path, line in zip(paths, lines):
        model = keras.saving.load_model(path)
        name, accuracy, *cells = line.split()
        assert name == path
        predicted = numpy(model(array(normalize(images.x_test)))).argmax(axis=1)
        assert accuracy == f"{(predicted == images.y_test).mean():.2%}"
        plain = gamma_hat(model, x, y, **options)
        normalized = gamma_hat(model, x, y, normalize_softmax=True, softmax_scale=0.1, **options)
        code = gamma_hat(model, x, y, training=True, chunk_size=10, **options)
        expected = [(plain, 1), (normalized, 1), (code, 2)]
        assert cells == [
            part
            for result, divisor in expected
            for part in (f"{result.value / divisor:.1f}", "+-", f"{result.stderr / divisor:.1f}")
        ]
