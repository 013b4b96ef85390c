"""Compare ways to compute gamma-hat while the training loss goes to zero.

A perceptron is trained on scikit-learn's digits, and its logits are then multiplied by larger and
larger scales, as training does once all examples are fitted. The naive form takes the singular
values of the Jacobian of the losses, by hand-written backpropagation in float32 or float64; the
package takes the log-odds, in float32.

    python benchmarks/saturation.py

prints the table and draws docs/saturation.png; `--docs FILE` puts the table between the markers of
a Markdown file too.
"""

import argparse
import pathlib

import keras
import matplotlib
import numpy as np
from models import digits
from report import ROOT, write_between_markers

from keras_infomcr.flatness import gamma_hat

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCALES = [1, 2, 3, 5, 8, 13, 20, 30, 50, 80, 130]
NUM_EXAMPLES = 100


def trained(x, y):
    """Return a perceptron that fits the digits."""
    keras.utils.set_random_seed(0)
    stack = [keras.Input((64,)), keras.layers.Dense(64, "tanh"), keras.layers.Dense(10)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    model.fit(x, y, epochs=30, verbose=0)
    return model


def naive(weights, x, y, dtype):
    """Return ln|J J^T| of the losses of the examples by the singular values of J."""
    kernel1, bias1, kernel2, bias2 = (w.astype(dtype) for w in weights)
    x = x.astype(dtype)
    hidden = np.tanh(x @ kernel1 + bias1)
    logits = hidden @ kernel2 + bias2
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    at_logits = shifted / shifted.sum(axis=1, keepdims=True)
    at_logits[np.arange(len(y)), y] -= 1
    at_hidden = at_logits @ kernel2.T * (1 - hidden**2)
    outer = [np.einsum("ni,no->nio", a, b) for a, b in ((x, at_hidden), (hidden, at_logits))]
    rows = [outer[0], at_hidden, outer[1], at_logits]
    rows = np.concatenate([r.reshape(len(x), -1) for r in rows], axis=1)
    with np.errstate(divide="ignore"):
        singular_values = np.linalg.svd(rows.astype("float64"), compute_uv=False)
        return 2 * np.sum(np.log(singular_values))


def measure():
    """Return rows of the table: dictionaries."""
    images, y = digits()
    x = (images.reshape(-1, 64) + 1) / 2  # pixels from 0 to 1
    model = trained(x, y)
    kernel1, bias1, kernel2, bias2 = model.get_weights()
    x, y = x[:NUM_EXAMPLES], y[:NUM_EXAMPLES]
    settings = {"num_examples": NUM_EXAMPLES, "num_trials": 1, "seed": 0}
    rows = []
    for scale in SCALES:
        model.set_weights([kernel1, bias1, scale * kernel2, scale * bias2])
        ours = gamma_hat(model, x, y, **settings)
        normalized = gamma_hat(model, x, y, normalize_softmax=True, **settings)
        rows.append(
            {
                "scale": scale,
                "loss": model.evaluate(x, y, verbose=0),
                "naive, float32": naive(model.get_weights(), x, y, "float32"),
                "naive, float64": naive(model.get_weights(), x, y, "float64"),
                "gamma_hat": ours.value,
                "log_loss_part": ours.log_loss_part,
                "geometry_part": ours.geometry_part,
                "normalised log_loss_part": normalized.log_loss_part,
                "normalised geometry_part": normalized.geometry_part,
            }
        )
    return rows


def table(rows):
    """Return the rows as Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|---:" * len(rows[0]) + "|"]
    for row in rows:
        scale, loss, *values = row.values()
        lines.append(f"| {scale} | {loss:.1e} | {' | '.join(f'{v:.1f}' for v in values)} |")
    return "\n".join([*lines, ""])


def plot(rows, path):
    """Save a picture of the values and of the two parts."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    values = {"gamma_hat": "-", "naive, float64": "s", "naive, float32": "o"}
    parts = {"log_loss_part": "-", "geometry_part": "-"}
    parts |= {f"normalised {part}": "--" for part in parts}
    titles = "Three ways to the same value", "Its parts"
    for axis, title, lines in zip(axes, titles, (values, parts)):
        for label, style in lines.items():
            plot_line(axis, rows, label, style)
        axis.set(title=title, xlabel="scale of the logits", xscale="log")
        axis.set_ylabel(f"natural logarithm, {NUM_EXAMPLES} examples")
        axis.set_yscale("symlog", linthresh=100)
    axes[0].plot([], [], "kv", label="-infinity")
    axes[0].set_ylim(-1e6, -500)
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(path, dpi=120)


def plot_line(axis, rows, label, style):
    """Plot a value over the scale, with a mark at the lower edge where it is -infinity."""
    scales, values = (np.array([r[name] for r in rows]) for name in ("scale", label))
    finite = np.isfinite(values)
    (line,) = axis.plot(scales[finite], values[finite], style, label=label)
    height = np.full(np.sum(~finite), 0.07 if style == "s" else 0.03)
    at_edge = {"transform": axis.get_xaxis_transform(), "color": line.get_color()}
    axis.plot(scales[~finite], height, "v", **at_edge)


def main():
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help = "Markdown file: also put the table between its markers"
    parser.add_argument("--docs", type=pathlib.Path, help=help)
    help, picture = "file of the picture (%(default)s)", ROOT / "docs" / "saturation.png"
    parser.add_argument("--figure", type=pathlib.Path, default=picture, help=help)
    settings = parser.parse_args()
    rows = measure()
    print(table(rows))
    plot(rows, settings.figure)
    if settings.docs:
        write_between_markers(settings.docs, "saturation", table(rows))


if __name__ == "__main__":
    main()
