"""Time a step of `SharpnessAware` against a plain transcription of SAM, side by side.

All steps run in one process and train the same Keras network, without weight penalties. On JAX the
transcription is a jitted step with `optax.contrib.sam` in opaque mode; on torch it moves the
weights in place and puts them back, as codes for torch do. Batch-norm statistics are those of the
pass at w. Before anything is timed, weights and statistics after one step must be equal.

    KERAS_BACKEND=jax python benchmarks/sam.py
    KERAS_BACKEND=torch python benchmarks/sam.py --networks resnet-20

prints the tables and adds them, as JSON, to those in benchmarks/results/; `--docs FILE` puts the
tables of all JSON files there between the markers of a Markdown file, without measuring. On JAX
it needs optax.
"""

import functools

import keras
import numpy as np
import report as reports
from machine import BACKEND, set_precision
from models import NETWORKS, batch_norms, make, random_data
from timing import in_turn, median_ratios, median_seconds, seconds_of

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SharpnessAware

RHO, LEARNING_RATE, MOMENTUM = 0.05, 0.01, 0.9
PLAIN, OURS = "plain Keras", "SharpnessAware"
OTHERS = {
    "jax": ("plain optax", "optax.contrib.sam"),
    "torch": ("plain torch", "SAM in torch"),
}


class KerasStep:
    """A training step of a Keras model.

    Args:
        model: A compiled `keras.Model`.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, x, y):
        return self.model.train_on_batch(x, y)

    def variables(self):
        """Return the trainable and the other variables."""
        return self.model.trainable_variables, self.model.non_trainable_variables


class OptaxStep:
    """A jitted training step on JAX.

    Args:
        model: A `keras.Model`.
        rho: Float, the radius of SAM, or `None` for a plain step.
    """

    def __init__(self, model, rho):
        import jax
        import optax

        optimizer = optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True)
        if rho:
            ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
            optimizer = optax.contrib.sam(optimizer, ascent, sync_period=2, opaque_mode=True)
        optimizer = optax.with_extra_args_support(optimizer)

        def loss(weights, statistics, x, y):
            predictions, statistics = model.stateless_call(weights, statistics, x, training=True)
            return model.loss(y, predictions), statistics

        def step(state, x, y):
            weights, statistics, moments = state
            evaluate = jax.value_and_grad(loss, has_aux=True)
            (value, after), gradients = evaluate(weights, statistics, x, y)

            def gradients_at(there, _):
                return evaluate(there, statistics, x, y)[1]

            updates, moments = optimizer.update(gradients, moments, weights, grad_fn=gradients_at)
            return value, (optax.apply_updates(weights, updates), after, moments)

        weights = [v.value for v in model.trainable_variables]
        statistics = [v.value for v in model.non_trainable_variables]
        self.state = weights, statistics, optimizer.init(weights)
        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, x, y):
        value, self.state = self.step(self.state, x, y)
        return float(value)

    def variables(self):
        """Return the trainable and the other variables."""
        return self.state[:2]


class TorchStep:
    """A training step on torch, which moves the weights in place.

    Args:
        model: A `keras.Model`.
        rho: Float, the radius of SAM, or `None` for a plain step.
    """

    def __init__(self, model, rho):
        import torch

        self.no_grad, self.model, self.rho = torch.no_grad, model, rho
        self.weights = [v.value for v in model.trainable_variables]
        self.optimizer = torch.optim.SGD(self.weights, LEARNING_RATE, MOMENTUM, nesterov=True)
        self.momenta = {layer: layer.momentum for layer in batch_norms(model)}

    def __call__(self, x, y):
        x, y = map(keras.ops.convert_to_tensor, (x, y))
        loss = self.backward(x, y)
        if self.rho:
            self.backward_uphill(x, y)
        self.optimizer.step()
        return loss.item()

    def backward(self, x, y):
        """Return the loss; the gradients are left with the weights."""
        self.optimizer.zero_grad()
        loss = self.model.loss(y, self.model(x, training=True))
        loss.backward()
        return loss

    def backward_uphill(self, x, y):
        """Take the gradients uphill, and leave weights and statistics as they are."""
        old = [w.detach().clone() for w in self.weights]
        norm = sum(w.grad.square().sum() for w in self.weights).sqrt()
        with self.no_grad():
            for w in self.weights:
                w.add_(w.grad * (self.rho / norm))
        for layer in self.momenta:
            layer.momentum = 1.0
        self.backward(x, y)
        for layer, momentum in self.momenta.items():
            layer.momentum = momentum
        with self.no_grad():
            for w, value in zip(self.weights, old):
                w.copy_(value)

    def variables(self):
        """Return the trainable and the other variables."""
        return self.model.trainable_variables, self.model.non_trainable_variables


def network(name, base=keras.Model, **compile_options):
    """Return a compiled model without weight penalties, with the same weights in each call."""
    optimizer = keras.optimizers.SGD(LEARNING_RATE, MOMENTUM, nesterov=True)
    model = make(name, base, optimizer=optimizer, jit_compile=BACKEND == "jax", **compile_options)
    for v in model.trainable_variables:
        v.regularizer = None
    return model


def make_steps(name):
    """Return the steps by the names in the tables."""
    transcription = {"jax": OptaxStep, "torch": TorchStep}[BACKEND]
    regularized = network(name, RegularizedModel, regularizer=SharpnessAware(RHO))
    steps = {PLAIN: KerasStep(network(name)), OURS: KerasStep(regularized)}
    for label, rho in zip(OTHERS[BACKEND], (None, RHO)):
        steps[label] = transcription(network(name), rho)
    return steps


def values(step):
    """Return two vectors: all trainable weights, and all that is not trained."""
    groups = [map(keras.ops.convert_to_numpy, group) for group in step.variables()]
    return [np.concatenate([np.zeros(0), *map(np.ravel, group)]) for group in groups]


def rounding_of_activations(model):
    """Return by how much float32 sums may round the activations, relative to their spread.

    A sum of n terms rounds by about sqrt(n) units in the last place, and layers add up alike.
    """
    terms = [np.prod(v.shape[:-1]) for v in model.trainable_variables if len(v.shape) > 1]
    return float(np.sqrt(np.sum(terms)) * np.finfo("float32").eps)


def check_equal(steps, start, rounding):
    """Raise unless `SharpnessAware` and the transcription have made the same of their first step.

    Distances are relative to the length of the step. The statistics may differ by the rounding d
    of activations. The weights may differ by sqrt(d): of the activations near zero a share of
    about d is rounded to the other side, where the slope of ReLU is another, and as many of the
    independent terms that the gradient is made of change. A plain step must be farther away.

    Args:
        steps: Dictionary of the steps by their names, each taken once.
        start: The `values` before.
        rounding: Float, d.

    Returns:
        Float, the distance of the weights.
    """
    plain, transcription = OTHERS[BACKEND]
    end = values(steps[transcription])
    lengths = [np.linalg.norm(a - b) or 1.0 for a, b in zip(end, start)]

    def distances(name):
        apart = [np.linalg.norm(a - b) for a, b in zip(values(steps[name]), end)]
        return [float(d / length) for d, length in zip(apart, lengths)]

    allowed = [rounding**0.5, rounding]
    ours, without = distances(OURS), distances(plain)
    if not (ours[0] < allowed[0] < without[0] and ours[1] <= allowed[1]):
        raise AssertionError(
            "One step of each must give the same weights and statistics, and a plain step other "
            f"weights. Received: distances of {OURS}={ours} and {plain}={without} from "
            f"{transcription}, allowed={allowed}."
        )
    return ours[0]


def measure(name, batch_size, rounds, seconds):
    """Return the rows of one table: dictionaries with the figures of each step."""
    steps = make_steps(name)
    x, y = random_data(steps[PLAIN].model, batch_size)
    network(name).train_on_batch(x, y)  # so that no row has what the framework does only once
    start = values(steps[PLAIN])
    calls = {label: functools.partial(step, x, y) for label, step in steps.items()}
    first = {label: seconds_of(call) for label, call in calls.items()}
    apart = check_equal(steps, start, rounding_of_activations(steps[PLAIN].model))
    print(f"{name}: the first steps of SAM differ by {apart:.1e} of their length")
    for call in calls.values():
        call()  # the second call may still compile something
    times = in_turn(calls, rounds, at_least=seconds)
    ratios = {of: median_ratios(times, of) for of in (PLAIN, OTHERS[BACKEND][1])}
    return [
        {
            "network": name,
            "batch size": batch_size,
            "step": label,
            "seconds": value,
            "ratio": ratios[PLAIN][label],
            "ratio to transcription": ratios[OTHERS[BACKEND][1]][label],
            "first call": first[label],
        }
        for label, value in median_seconds(times).items()
    ]


def key_of(row):
    """Return what all rows of one table have in common."""
    return row["network"], row["batch size"]


def table(report):
    """Return the rows of a report as Markdown, a table for each network and batch size."""
    lines = []
    for key in sorted(set(map(key_of, report["rows"]))):
        lines += [
            "**{}, batch {}** ({})".format(*key, report["versions"]),
            "",
            "| step | seconds | step time, times plain Keras | times the transcription of SAM "
            "| first call, s |",
            "|---|---:|---:|---:|---:|",
        ]
        for r in report["rows"]:
            if key_of(r) == key:
                lines.append(
                    f"| {r['step']} | {r['seconds']:.4f} | {r['ratio']:.2f} "
                    f"| {r['ratio to transcription']:.2f} | {r['first call']:.1f} |"
                )
        lines.append("")
    return "\n".join(lines)


def parse():
    """Return the settings from the command line."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "networks to measure (%(default)s)"
    add("--networks", nargs="+", choices=NETWORKS, default=["mlp", "resnet-20"], help=help)
    add("--batch-size", type=int, default=128, help="examples in a batch (%(default)s)")
    add("--rounds", type=int, default=10, help="least number of timed steps of each kind")
    help = "least number of seconds that are filled with rounds (%(default)s)"
    add("--seconds", type=float, default=30.0, help=help)
    help = "measure only the perceptron, for a second"
    add("--quick", action="store_true", help=help)
    settings = parser.parse_args()
    if settings.quick:
        settings.networks, settings.seconds = ["mlp"], 1.0
    return settings


def main():
    """Measure, print and save."""
    settings = parse()
    if settings.docs:
        reports.write_docs(settings.output, "sam", table, settings.docs)
        return
    if BACKEND not in OTHERS:
        raise SystemExit(
            f"There is a transcription for JAX and one for torch. Received: backend={BACKEND!r}. "
            "Set the environment variable KERAS_BACKEND."
        )
    set_precision("float32")
    report, path = reports.load(settings.output, "sam")
    for name in settings.networks:
        rows = measure(name, settings.batch_size, settings.rounds, settings.seconds)
        print(table(report | {"rows": rows}), flush=True)
        case = name, settings.batch_size
        report["rows"] = [r for r in report["rows"] if key_of(r) != case] + rows
        reports.save(report, path)
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
