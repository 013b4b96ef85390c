"""Gather the figures of all backends in docs/performance.md, each beside the limit that it has.

    python benchmarks/performance.py

reads the JSON reports of `step_cost.py`, `gamma_hat.py`, `scaling.py` and `on_gpu.py`, and writes
the tables between the markers of the document. Nothing is measured.
"""

import argparse
import json
import pathlib
from operator import itemgetter

import report as reports

DOCS = reports.ROOT / "docs" / "performance.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}
BATCH_SIZE, NUM_SUB_BATCHES, NUM_EXAMPLES = 128, 8, 100
# The arithmetic of each kind of step, in plain steps: see docs/step_cost.md.
ARITHMETIC = {
    "plain": 1,
    "closed gate": 1,
    "sub_batches": 2,
    "sub_batches, M/2 perturbed": 1.5,
    "sub_batches, M/4 perturbed": 1.25,
    "sub_batches, Hessian-vector product": 3,
    "full_batch": 3,
    "full_batch, M/2 perturbed": 2,
    "full_batch, M/4 perturbed": 1.5,
    "full_batch, Hessian-vector product": 4,
    "literal": 3,
    "SAM": 2,
    "ASAM": 2,
    "m-SAM": 2,
    "F-SAM": 2,
    "weight noise": 1,
    "spectral radius": None,
    "Entropy-SGD": 1,
    "3 replicas": 1,
}
CHIEF = ["plain", "sub_batches", "sub_batches, Hessian-vector product", "full_batch", "SAM"]
# What a GPU is to reach with batches of 512, and what gamma-hat is to reach.
GPU_TARGETS = {"sub_batches": 2.1, "sub_batches, M/2 perturbed": 1.6, "SAM": 2.05}
GAMMA_TARGETS = {"TensorFlow": 2.2, "JAX": 2.2, "torch": 2.5}
GPU_GAMMA_TARGET = "2"


def load(folder, name, kind):
    """Return the reports of a benchmark on `"cpu"` or `"gpu"`, by backend and settings."""
    found = {}
    for backend, title in BACKENDS.items():
        for path in sorted(folder.glob(f"{name}_{backend}_{kind}*.json")):
            settings = path.stem.removeprefix(f"{name}_{backend}_{kind}").strip("_").split("_")
            label = ", ".join([title, *(s for s in settings if s and s != "float32")])
            found[label] = json.loads(path.read_text())
    return found


def versions(found):
    """Return what each report was measured with, a line each."""
    return "\n".join([*(f"* {label}: {r['versions']}" for label, r in found.items()), "", ""])


def by_step(key):
    """Return where a key `(network, ..., step)` stands in a table."""
    *case, step = key
    return *case, list(ARITHMETIC).index(step)


def plain_or_ratio(row):
    """Return the seconds of a plain step, and of any other how many plain steps it takes."""
    return f"{row['seconds']:.3f} s" if row["step"] == "plain" else f"{row['ratio']:.2f}"


def limit(value):
    """Return a limit as text."""
    return "" if value is None else f"{value:g}"


def is_usual(row):
    """Return whether a step was measured with the batch size and M of the first tables."""
    return (row["batch size"], row["M"]) == (BATCH_SIZE, NUM_SUB_BATCHES)


def step_times(folder):
    """Return the table of step times."""
    found = load(folder, "step_cost", "cpu")
    columns = reports.pick(found, itemgetter("network", "step"), plain_or_ratio, is_usual)
    head = ["network", "step", "arithmetic"]
    table = reports.grid(head, columns, lambda key: [limit(ARITHMETIC[key[1]])], by_step)
    return versions(found) + table


def first_calls_and_memory(folder, kind="cpu", is_shown=is_usual):
    """Return the table of first calls, relative to a plain one, and of peak memory."""
    columns = {}
    for label, report in load(folder, "step_cost", kind).items():
        rows = [r for r in report["rows"] if is_shown(r) and r["step"] in CHIEF]
        if rows:
            keys = [(r["network"], r["batch size"], r["step"]) for r in rows]
            calls = (f"{r['first call ratio']:.1f}" for r in rows)
            columns[f"first call, {label}"] = dict(zip(keys, calls))
            columns[f"peak MiB, {label}"] = dict(zip(keys, map(peak, rows)))
    return reports.grid(["network", "batch", "step"], columns, order=by_step)


def peak(row):
    """Return the peak memory of a row as text."""
    return "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}"


def other_sizes(folder):
    """Return the table of other batch sizes and numbers of sub-batches: a column a kind of step."""
    limits = list(ARITHMETIC.items())[2:10]
    columns = {step: {("arithmetic", "", 0, 0): limit(value)} for step, value in limits}
    for label, report in load(folder, "step_cost", "cpu").items():
        for r in report["rows"]:
            if r["step"] in columns and not is_usual(r):
                key = label, r["network"], r["batch size"], r["M"]
                columns[r["step"]][key] = f"{r['ratio']:.2f}"
    head = ["backend", "network", "batch", "M"]
    return reports.grid(head, columns, order=lambda key: (key[0] != "arithmetic", key))


def gamma_hat(folder):
    """Return the table of gamma-hat in plain passes."""
    found = load(folder, "gamma_hat", "cpu")
    columns = {
        f"{label} (target {GAMMA_TARGETS[label]:g})": cells
        for label, cells in passes(found, "gamma-hat").items()
    }
    literal = passes(found, "literal")
    columns |= {f"Eq. 5 to the letter, {label}": cells for label, cells in literal.items()}
    return versions(found) + reports.grid(["network", "weights", "N'"], columns)


def passes(found, kind):
    """Return the columns of plain passes that gamma-hat or its literal form takes."""
    return reports.pick(
        found,
        itemgetter("network", "weights", "examples"),
        "{ratio:.2f}".format_map,
        lambda r: r["kind"] == kind,
    )


def gamma_hat_details(folder):
    """Return the table of gamma-hat's seconds, first calls, memory and values."""
    columns = {name: {} for name in ("seconds", "first call, s", "peak MiB", "value")}
    for label, report in load(folder, "gamma_hat", "cpu").items():
        for r in report["rows"]:
            if r["examples"] == NUM_EXAMPLES:
                value = "" if r["value"] is None else f"{r['value']:.4f}"
                cells = f"{r['seconds']:.3f}", f"{r['first call']:.1f}", peak(r), value
                for cells_of, cell in zip(columns.values(), cells):
                    cells_of[r["network"], label, r["kind"]] = cell
    return reports.grid(["network", "backend", ""], columns)


def several_devices(folder):
    """Return the table of what several devices communicate, relative to a plain step."""
    columns = {}
    for label, report in load(folder, "scaling", "cpu").items():
        rows = {(r["network"], r["step"], r["devices"]): r["bytes"] for r in report["rows"]}
        for (network, step, devices), sent in rows.items():
            if devices > 1 and step != "plain":
                cells = columns.setdefault(f"{label}, {devices} devices", {})
                cells[network, step] = f"{sent / rows[network, 'plain', devices]:.3f}"
    return reports.grid(["network", "step", "limit"], columns, lambda key: ["1"], by_step)


def gpu_steps(folder):
    """Return the table of step times on GPUs."""
    found = load(folder, "step_cost", "gpu")
    columns = reports.pick(
        found,
        itemgetter("network", "batch size", "step"),
        plain_or_ratio,
        lambda r: r["M"] == NUM_SUB_BATCHES,
    )

    def limits(key):
        target = GPU_TARGETS.get(key[2]) if key[1] == 512 else None
        return limit(ARITHMETIC[key[2]]), limit(target)

    head = ["network", "batch", "step", "arithmetic", "target"]
    return versions(found) + reports.grid(head, columns, limits, by_step)


def gpu_first_calls(folder):
    """Return the same table of first calls on GPUs."""
    return first_calls_and_memory(folder, "gpu", lambda r: r["M"] == NUM_SUB_BATCHES)


def gpu_gamma_hat(folder):
    """Return the table of gamma-hat on GPUs, in plain passes."""
    columns = passes(load(folder, "gamma_hat", "gpu"), "gamma-hat")
    return reports.grid(
        ["network", "weights", "N'", "target"], columns, lambda key: [GPU_GAMMA_TARGET]
    )


def gpu_numbers(folder):
    """Return the table of what else `on_gpu.py` measures."""
    found = load(folder, "on_gpu", "gpu")
    columns = reports.pick(found, itemgetter("part", "what", "unit"), "{value:.3g}".format_map)
    return reports.grid(["", "", ""], columns) if columns else "No such report is at hand yet.\n"


TABLES = {
    "step times": step_times,
    "first calls and memory": first_calls_and_memory,
    "other sizes": other_sizes,
    "gamma-hat": gamma_hat,
    "gamma-hat in detail": gamma_hat_details,
    "several devices": several_devices,
    "steps on GPUs": gpu_steps,
    "first calls on GPUs": gpu_first_calls,
    "gamma-hat on GPUs": gpu_gamma_hat,
    "numbers on GPUs": gpu_numbers,
}


def write(folder, path):
    """Put all tables between their markers in a file."""
    for name, table in TABLES.items():
        reports.write_between_markers(path, name, table(folder))


def main():
    """Write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=pathlib.Path, default=reports.RESULTS, help="folder of the JSON reports")
    add("--print", action="store_true", help="print the tables instead")
    settings = parser.parse_args()
    if not settings.print:
        write(settings.results, DOCS)
        return
    for name, table in TABLES.items():
        print(f"{name}:\n\n{table(settings.results)}")


if __name__ == "__main__":
    main()
