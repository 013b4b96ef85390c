"""Time the measures of flatness against epochs of training, and against libraries for torch.

    python benchmarks/flatness.py --quick
    python benchmarks/flatness.py --networks mlp resnet-20
    KERAS_BACKEND=torch python benchmarks/flatness.py --networks --versus

prints the tables and keeps them, as JSON, in benchmarks/results/; `--docs FILE` puts the tables of
all JSON files there between the markers of a Markdown file, without measuring. KERAS_BACKEND
chooses the backend.

A measure's cost is that of its passes over the data, in units of one epoch of forward and backward
passes over the same data in the same batches; both are compiled before they are timed. `--versus`
(on torch; needs curvlinops-for-pytorch and pyhessian) times the largest eigenvalue of the Hessian
at the same tolerance and its trace from as many products, of the same network, weights and data.
"""

import functools
import warnings

import keras
import numpy as np
import report as reports
from gamma_hat import make
from keras import layers
from machine import BACKEND
from timing import in_turn, median_ratios, median_seconds

from keras_infomcr import flatness
from keras_infomcr.flatness.loss.loss_function import LossFunction

# For each measure: settings with which it makes few passes, the number of these passes, and the
# number of passes that it makes by default (`None` if that depends on the spectrum).
MEASURES = {
    "hessian_trace": ({"num_products": 6}, 6, 30),
    "hessian_frobenius_norm": ({"num_products": 6}, 6, 30),
    "hessian_spectral_radius": ({"max_products": 6, "tolerance": 1e-12}, 6, None),
    "hessian_top_eigenvalues": (
        {"num_eigenvalues": 3, "max_products": 6, "tolerance": 1e-12},
        6,
        None,
    ),
    "hessian_spectral_density": ({"num_probes": 1, "num_steps": 6}, 6, 150),
    "fisher_trace": ({"num_examples": 100, "num_trials": 1}, 0.5, 5),
    "input_jacobian_norm": ({}, 1, 1),
    "local_energy": ({"num_samples": 5}, 6, 21),
    "local_entropy": ({"num_samples": 5}, 5, 20),
    "local_entropy_gradient_norm": ({"num_chains": 2, "num_steps": 5}, 10, 80),
    "local_learning_coefficient": ({"num_chains": 2, "num_steps": 5}, 11, 401),
    "adaptive_sharpness": ({"num_steps": 5}, 6, 21),
}
BATCH_SIZE, NUM_EXAMPLES = 100, 200
NUM_PRODUCTS, TOLERANCE = 30, 1e-3


def timed(functions, rounds):
    """Return the seconds of each function in each round; all are compiled before."""
    for function in functions.values():
        function()
    return in_turn(functions, rounds)


def epoch(model, x, y):
    """Return a function that takes the gradient of the loss over all of the data."""
    loss = LossFunction(model)
    starts = range(0, len(x), BATCH_SIZE)
    data = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE]) for i in starts]
    return lambda: loss.gradient(data, loss.point())


def costs(network, rounds):
    """Return the row of a network: what a pass of each measure takes, in epochs."""
    model, x, y = make(network)
    functions = {"epoch": epoch(model, x, y)}

    def measured(name, settings):
        chunks = {} if name.startswith("fisher") else {"chunk_size": BATCH_SIZE}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so few products have not converged
            getattr(flatness, name)(model, x, y, seed=0, **chunks, **settings)

    for name, (settings, _, _) in MEASURES.items():
        functions[name] = functools.partial(measured, name, settings)
    times = timed(functions, rounds)
    ratios = median_ratios(times, "epoch")
    return {
        "network": network,
        "epoch_seconds": median_seconds(times)["epoch"],
        "epochs_a_pass": {name: ratios[name] / MEASURES[name][1] for name in MEASURES},
    }


def twins(network):
    """Return a Keras model, a torch module of the same weights, and data for them."""
    import torch
    from torch import nn

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if network == "perceptron":
        sizes, stack, modules = [64, 256, 256, 10], [keras.Input((64,))], []
        for i, size in enumerate(sizes[1:]):
            stack.append(layers.Dense(size, "relu" if size > 10 else None))
            modules += [nn.Linear(sizes[i], size), *([nn.ReLU()] if size > 10 else [])]
        x = rng.normal(size=(1000, 64)).astype("float32")
    else:
        keras.config.set_image_data_format("channels_first")  # as torch has it
        stack = [keras.Input((3, 16, 16))]
        stack += [layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu")]
        stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
        modules = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        x = rng.normal(size=(500, 3, 16, 16)).astype("float32")
    model, module = keras.Sequential(stack), nn.Sequential(*modules)
    y = rng.integers(10, size=len(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=5, verbose=0)  # else all eigenvalues are of one size
    for parameter, weight in zip(module.parameters(), model.get_weights()):
        axes = (3, 2, 0, 1) if weight.ndim == 4 else None
        parameter.data.copy_(torch.tensor(weight.transpose(axes)))
    device = model.trainable_variables[0].value.device
    batches = [
        tuple(torch.tensor(a[i : i + BATCH_SIZE], device=device) for a in (x, y))
        for i in range(0, len(x), BATCH_SIZE)
    ]
    return model, module.to(device).eval(), (x, y), batches


def versus(network, rounds):
    """Return the row of a network: seconds, results and ratios of three libraries."""
    import curvlinops
    import torch
    from pyhessian import hessian
    from scipy.sparse.linalg import eigsh

    torch.set_num_threads(1)  # what else runs on the machine disturbs one thread least
    model, module, data, batches = twins(network)
    loss, found = torch.nn.CrossEntropyLoss(), {}
    cuda = batches[0][0].is_cuda

    def operator():
        parameters = list(module.parameters())
        return curvlinops.HessianLinearOperator(
            module, loss, parameters, batches, check_deterministic=False
        )

    def pyhessian_operator():
        return hessian(module, loss, dataloader=batches, cuda=cuda)

    def kept(name, value):
        found[name] = float(np.ravel(value)[0])

    settings = {"chunk_size": BATCH_SIZE, "seed": 0}
    top = functools.partial(
        flatness.hessian_top_eigenvalues, model, *data, num_eigenvalues=1, **settings
    )
    trace = functools.partial(flatness.hessian_trace, model, *data, **settings)
    exact = top(tolerance=1e-6).value

    def power(tolerance):
        return pyhessian_operator().eigenvalues(1000, tolerance)[0][0]

    # PyHessian stops when two iterations differ by less than its tolerance, which bounds no error.
    # So it is timed also at the largest tolerance at which its error is as small as the others'.
    tried = (10.0**-k for k in range(3, 7))
    enough = next(t for t in tried if abs(power(t) / exact - 1) <= TOLERANCE)
    largest = {"k": 1, "which": "LM", "tol": TOLERANCE}
    functions = {
        "eigenvalue/ours": lambda: top(tolerance=TOLERANCE).value,
        "eigenvalue/curvlinops": lambda: eigsh(operator().to_scipy(), **largest)[0],
        **{
            f"eigenvalue/pyhessian at {t:g}": functools.partial(power, t)
            for t in sorted({TOLERANCE, enough}, reverse=True)
        },
        "trace/ours": lambda: trace(num_products=NUM_PRODUCTS).value,
        "trace/curvlinops": lambda: curvlinops.hutchpp_trace(operator(), NUM_PRODUCTS).item(),
        "trace/pyhessian": lambda: np.mean(pyhessian_operator().trace(NUM_PRODUCTS, 0.0)),
    }
    calls = {name: lambda n=name, f=f: kept(n, f()) for name, f in functions.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = median_seconds(timed(calls, rounds))
    errors = {n: abs(v / exact - 1) for n, v in found.items() if n.startswith("eigenvalue")}
    return {"network": network, "seconds": seconds, "found": found, "errors": errors}


def table(report):
    """Return a report as tables in Markdown."""
    lines = [f"{report['versions']}:", ""]
    rows = [r for r in report["rows"] if "epochs_a_pass" in r]
    if rows:
        names = " | ".join(f"{r['network']}: a pass | at the defaults" for r in rows)
        lines.append(f"| measure | passes at the defaults | {names} |")
        lines.append("|---|--:" + "|--:|--:" * len(rows) + "|")
        for name, (_, _, default) in MEASURES.items():
            cells = [f"{default:g}" if default else "as needed"]
            for row in rows:
                cost = row["epochs_a_pass"][name]
                cells += [f"{cost:.2f}", f"{cost * default:.0f}" if default else ""]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        lines.append("")
    rows = [r for r in report["rows"] if "found" in r]
    if rows:
        lines.append("| network | quantity | library | found | error | seconds | times ours |")
        lines.append("|---|---|---|--:|--:|--:|--:|")
        for row in rows:
            for name, seconds in row["seconds"].items():
                quantity, library = name.split("/")
                ratio = seconds / row["seconds"][f"{quantity}/ours"]
                error = f"{row['errors'][name]:.0e}" if name in row["errors"] else ""
                lines.append(
                    f"| {row['network']} | {quantity} | {library} | {row['found'][name]:.4g} "
                    f"| {error} | {seconds:.2f} | {ratio:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main():
    """Measure, print and keep, or write the docs."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "networks, by their names in examples/networks, or mlp (%(default)s)"
    add("--networks", nargs="*", default=["mlp"], help=help)
    help = "also compare with the libraries curvlinops and PyHessian (torch only)"
    add("--versus", action="store_true", help=help)
    add("--rounds", type=int, default=3, help="timed calls of each function (%(default)s)")
    add("--quick", action="store_true", help="time a single round")
    options = parser.parse_args()
    if options.docs:
        reports.write_docs(options.output, "flatness", table, options.docs)
        return
    if options.versus and BACKEND != "torch":
        parser.error("--versus needs KERAS_BACKEND=torch")
    rounds = 1 if options.quick else options.rounds
    report, path = reports.load(options.output, "flatness")
    rows = [costs(network, rounds) for network in options.networks]
    if options.versus:
        rows += [versus(network, rounds) for network in ("perceptron", "convnet")]
    names = {(row["network"], "found" in row) for row in rows}
    others = [r for r in report["rows"] if (r["network"], "found" in r) not in names]
    report["rows"] = others + rows
    reports.save(report, path)
    print(table(report))


if __name__ == "__main__":
    main()
