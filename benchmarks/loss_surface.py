"""Time a point of `flatness.loss_surface` against `model.evaluate` on the same examples.

    python benchmarks/loss_surface.py
    KERAS_BACKEND=jax python benchmarks/loss_surface.py --networks mlp resnet-20

prints the table and keeps it, as JSON, in benchmarks/results/; `--docs FILE` puts the tables of all
JSON files there between the markers of a Markdown file, without measuring. KERAS_BACKEND chooses
the backend. Everything is compiled before it is timed.
"""

import functools

import report as reports
from gamma_hat import make
from models import random_data
from timing import in_turn, median_ratios, median_seconds

from keras_infomcr.flatness import loss_surface

NUM_EXAMPLES, CHUNK_SIZE, NUM_POINTS = 500, 125, 5


def costs(network, rounds):
    """Return the row of a network: the seconds of a point, and times those of `evaluate`."""
    model, _, _ = make(network)
    x, y = random_data(model, NUM_EXAMPLES)
    settings = {"directions": 1, "num_points": NUM_POINTS, "seed": 0, "chunk_size": CHUNK_SIZE}
    functions = {
        "evaluate": functools.partial(model.evaluate, x, y, batch_size=CHUNK_SIZE, verbose=0),
        "surface": functools.partial(loss_surface, model, x, y, **settings),
        "reestimated": functools.partial(loss_surface, model, x, y, reestimate=True, **settings),
    }
    for function in functions.values():
        function()
    times = in_turn(functions, rounds)
    seconds, ratios = median_seconds(times), median_ratios(times, "evaluate")
    kinds = ("surface", "reestimated")
    return {
        "network": network,
        "evaluate_seconds": seconds["evaluate"],
        "seconds_a_point": {kind: seconds[kind] / NUM_POINTS for kind in kinds},
        "evaluations_a_point": {kind: ratios[kind] / NUM_POINTS for kind in kinds},
    }


def table(report):
    """Return a report as a table in Markdown."""
    lines = [
        f"{report['versions']}:",
        "",
        "| network | statistics re-estimated | seconds a point | times `model.evaluate` "
        "| minutes for 25 x 25 points |",
        "|---|---|--:|--:|--:|",
    ]
    for row in report["rows"]:
        for kind, said in (("surface", "no"), ("reestimated", "yes")):
            seconds, ratio = row["seconds_a_point"][kind], row["evaluations_a_point"][kind]
            lines.append(
                f"| {row['network']} | {said} | {seconds:.3f} | {ratio:.2f} "
                f"| {seconds * 625 / 60:.1f} |"
            )
    return "\n".join([*lines, "", ""])


def main():
    """Measure, print and keep, or write the docs."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    help = "networks, by their names in examples/networks, or mlp (%(default)s)"
    add("--networks", nargs="*", default=["mlp", "resnet-20"], help=help)
    help = "timed calls of each function (%(default)s)"
    add("--rounds", type=int, default=5, help=help)
    options = parser.parse_args()
    if options.docs:
        reports.write_docs(options.output, "loss_surface", table, options.docs)
        return
    report, path = reports.load(options.output, "loss_surface")
    rows = [costs(network, options.rounds) for network in options.networks]
    others = [r for r in report["rows"] if r["network"] not in options.networks]
    report["rows"] = others + rows
    reports.save(report, path)
    print(table(report))


if __name__ == "__main__":
    main()
