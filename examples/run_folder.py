"""What a training run leaves in its folder, and how it is taken up again."""

import csv
import importlib
import json
import os
import platform

import keras
import matplotlib
import numpy as np

import keras_infomcr

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Settings that do not change what a run computes.
FREE = ("output", "resume", "verbose")


class Checkpoint(keras.callbacks.Callback):
    """Save the model, with its optimizer, every so many epochs and after the last.

    An interruption while it is being written leaves no broken checkpoint.

    Args:
        folder: Path of the run's folder.
        frequency: Integer, the epochs between checkpoints.
    """

    def __init__(self, folder, frequency):
        super().__init__()
        self.folder = folder
        self.frequency = frequency

    def on_epoch_end(self, epoch, logs=None):
        epoch += 1
        if epoch % self.frequency == 0 or epoch == self.params["epochs"]:
            partial = self.folder / "partial.keras"
            self.model.save(partial)
            os.replace(partial, self.folder / f"epoch-{epoch:03d}.keras")


def prepare(settings, model):
    """Open a run's folder; if the run goes on, load its last checkpoint.

    Args:
        settings: Namespace of the run's settings.
        model: The compiled model.

    Returns:
        Integer, the epoch to begin with, from 0.

    Raises:
        SystemExit: If the folder holds a run that is not to go on, or one with other settings.
    """
    path, log = settings.output / "settings.json", settings.output / "log.csv"
    wanted = _fixed(settings)
    checkpoints = {int(p.stem.split("-")[1]): p for p in settings.output.glob("epoch-*.keras")}
    if not (log.exists() or checkpoints):  # perhaps a run that has failed to begin
        settings.output.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(wanted, indent=2))
        return 0
    if not settings.resume:
        raise SystemExit(
            "The output folder must not hold a run yet. Pass --resume to go on with it, or another "
            f"folder. Received: --output {settings.output}"
        )
    found = json.loads(path.read_text())
    different = [key for key in wanted if wanted[key] != found.get(key)]
    if different:
        raise SystemExit(
            "A run goes on with its own settings. Received: "
            + ", ".join(f"{key}={wanted[key]} (the run: {found.get(key)})" for key in different)
        )
    epoch = max(checkpoints, default=0)
    if checkpoints:
        model.optimizer.build(model.trainable_variables)
        model.load_weights(checkpoints[epoch])
    if log.exists():
        _rewind(log, epoch)
    print(f"The run goes on after {epoch} epochs.")
    return epoch


def finish(settings, model, train_data, test_data):
    """Evaluate a trained model; write `results.json` and `curves.png`; print the results."""
    rows = read(settings.output / "log.csv")
    results = {}
    for name, (x, y) in {"train": train_data, "test": test_data}.items():
        found = model.evaluate(x, y, batch_size=settings.batch_size, verbose=0, return_dict=True)
        results |= {f"{name}_{key}": found[key] for key in ("accuracy", "cross_entropy")}
    results |= {key: rows[-1][key] for key in ("gamma_hat", "gamma_hat_stderr") if key in rows[-1]}
    backend = keras.backend.backend()
    report = {
        "settings": _fixed(settings),
        "versions": {
            "python": platform.python_version(),
            "keras_infomcr": keras_infomcr.__version__,
            "keras": keras.__version__,
            backend: importlib.import_module(backend).__version__,
            "numpy": np.__version__,
        },
        # JSON has no other numbers.
        "results": {k: v if np.isfinite(v) else None for k, v in results.items()},
    }
    _write(settings.output / "results.json", json.dumps(report, indent=2, allow_nan=False))
    _plot(rows, settings)
    for key, value in results.items():
        print(f"{key:<20} {value:.5g}")
    print(f"The results are in {settings.output}")


def _fixed(settings):
    fixed = {key: value for key, value in vars(settings).items() if key not in FREE}
    return fixed | {"backend": keras.backend.backend()}


def _write(path, text):
    """Write a file that an interruption leaves either old or new."""
    partial = path.with_name("partial")
    partial.write_text(text)
    os.replace(partial, path)


def read(path):
    """Return the rows of a log, as dictionaries of floats; NaN where nothing was measured."""
    with path.open(newline="") as file:
        return [
            {key: float("nan" if value in ("NA", "") else value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _rewind(path, epoch):
    """Cut off the rows of a log that epochs after the last checkpoint have left."""
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    kept = [row for row in rows if int(row.split(",")[0]) < epoch]
    _write(path, "".join([header, *kept]) if kept else "")  # CSVLogger writes the header


def _plot(rows, settings):
    """Save a picture of the curves, with the falls of the learning rate and the regulariser."""
    panels = {
        "Cross-entropy": {"training": "cross_entropy", "test": "val_cross_entropy"},
        "Accuracy": {"training": "accuracy", "test": "val_accuracy"},
    }
    if "gamma_hat" in rows[-1]:
        panels["gamma-hat, not normalised"] = {"training images": "gamma_hat"}
    epochs = np.array([row["epoch"] + 1 for row in rows])
    regularized = epochs[np.isfinite([row.get("infomcr_reg", np.nan) for row in rows])]
    size = (4 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, curves) in zip(axes, panels.items()):
        for (name, key), style in zip(curves.items(), ("-", "--")):
            values = np.array([row[key] for row in rows])
            known = np.isfinite(values)
            axis.plot(epochs[known], values[known], style, marker=".", label=name)
        if len(regularized):
            first, last = regularized[[0, -1]]
            axis.axvspan(first - 0.5, last + 0.5, alpha=0.1, label="regularised")
        for boundary in settings.boundaries:
            if boundary < settings.epochs:
                axis.axvline(boundary + 0.5, color="gray", lw=1, ls=":")
        axis.set(title=title, xlabel="epoch", xlim=(0.5, settings.epochs + 0.5))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    if any(0 < row["cross_entropy"] < np.inf for row in rows):  # something is to be seen
        axes[0].set_yscale("log")
    figure.savefig(settings.output / "curves.png", dpi=120)
    plt.close(figure)
