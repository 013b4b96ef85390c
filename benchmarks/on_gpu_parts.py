"""The parts of `on_gpu.py`: what each measures and adds to the reports, row by row."""

import concurrent.futures
import functools
import itertools
import time
import traceback

import gamma_hat
import keras
import models
import on_gpu_numbers
import report as reports
import step_cost
from machine import BACKEND, peak_memory, set_precision
from timing import in_turn, seconds_of

KINDS = [
    "plain",
    "sub_batches",
    "SAM",
    "sub_batches, M/2 perturbed",
    "full_batch",
    "full_batch, M/2 perturbed",
    "sub_batches, Hessian-vector product",
]
# JAX alone compiles, on CPUs, and each program on one core.
THREADS = 8 if BACKEND == "jax" else 1
# Seconds after which what has been compiled is timed, though the rest still compiles.
PATIENCE = 90.0


def measure(name, output, quick, deadline):
    """Measure a part.

    Args:
        name: String, the part.
        output: Path of the folder of the reports.
        quick: Boolean, whether tiny networks and little data are enough.
        deadline: Float, the time, by `time.monotonic`, after which nothing new is begun.
    """
    set_precision("float32")
    if name.startswith("steps, "):
        steps(name.removeprefix("steps, "), output, quick, deadline)
    elif name == "gamma-hat":
        gamma_hats(output, quick, deadline)
    else:
        report, path = reports.load(output, "on_gpu")
        for row in on_gpu_numbers.PARTS[name](quick):
            report["rows"] = [r for r in report["rows"] if not on_gpu_numbers.same(r, row)] + [row]
            reports.save(report, path)
            print(on_gpu_numbers.table(report | {"rows": [row]}), flush=True)
    set_precision("float32")


def steps(precision, output, quick, deadline):
    """Time kinds of steps beside plain ones, in an order that brings the targets' rows first."""
    set_precision(precision)
    networks, sizes, count = ["resnet-20", "vit", "wrn-28-2"], [512, 128], 8
    kinds = KINDS
    if quick:
        networks, sizes, count, kinds = ["mlp"], [32], 4, KINDS[:3]
    report, path = reports.load(output, "step_cost", precision)
    for batch_size, network in itertools.product(sizes, networks):
        if time.monotonic() > deadline:
            return
        for rows in rows_of_steps((network, batch_size, count), kinds, quick):
            print(step_cost.table(report | {"rows": rows}), flush=True)
            report["rows"] = step_cost.merged(report["rows"], rows)
            reports.save(report, path)
        keras.utils.clear_session()


def rows_of_steps(case, kinds, quick):
    """Yield the rows of each kind of step and of the plain step beside it, as soon as they exist.

    On JAX all kinds are compiled side by side: some take a minute, and the machine has many cores.
    """
    options = {"jit_compile": BACKEND == "jax", "metrics": ["accuracy"]}
    network, batch_size, count = case
    data = models.random_data(models.make(network), batch_size)
    made = dict(step_cost.make_models(network, count, kinds, **options))
    calls = {k: functools.partial(made[k].train_on_batch, *data) for k in kinds}
    first = {"plain": seconds_of(calls["plain"])}
    time_kind = functools.partial(_time_kind, case, calls, first, quick)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending = {pool.submit(seconds_of, calls[kind]): kind for kind in kinds[1:]}
        while pending:
            # Nothing is timed while others compile, unless they take too long.
            concurrent.futures.wait(pending, PATIENCE)
            for future in [f for f in pending if f.done()]:
                kind = pending.pop(future)
                try:
                    first[kind] = future.result()
                    yield time_kind(kind)
                except Exception:
                    print(f"{network}, batch {batch_size}, {kind} failed:", flush=True)
                    traceback.print_exc()


def _time_kind(case, calls, first, quick, kind):
    pair = {label: calls[label] for label in ("plain", kind)}
    for call in pair.values():
        call()  # the second call may still compile something
    times = in_turn(pair, 2 if quick else 3, at_least=0.0 if quick else 1.0)
    peaks = {label: peak_memory(call) for label, call in pair.items()}
    return step_cost.rows_of(case, times, first, peaks)


def gamma_hats(output, quick, deadline):
    """Time gamma-hat beside a plain pass."""
    networks, counts = (["mlp"], [20]) if quick else (["resnet-20", "vit", "wrn-28-2"], [100, 1000])
    report, path = reports.load(output, "gamma_hat")
    for case in itertools.product(networks, counts):
        if time.monotonic() > deadline:
            return
        try:
            rows = gamma_hat.measure(*case, rounds=3, with_literal=False)
        except Exception:
            traceback.print_exc()
            continue
        print(gamma_hat.table(report | {"rows": rows}), flush=True)
        report["rows"] = [r for r in report["rows"] if gamma_hat.key_of(r) != case] + rows
        reports.save(report, path)
        keras.utils.clear_session()
