"""Measure on one GPU, on JAX and then on torch, what fits into eight minutes.

    python benchmarks/on_gpu.py --output FOLDER

runs these parts on each backend, the most valuable first: what a step costs, what gamma-hat costs,
whether the numbers agree with the CPU's, sub-batches side by side, what TensorFloat-32 would save
in paired differences, steps in bfloat16 and TensorFloat-32, Lanczos iterations, and some tests.
Each row is written into the JSON reports of FOLDER as soon as it is measured. A part that fails, or
outlasts its share of the time, is stopped, and the next one begins. At the end a table says what
became of each part, and the tables of `performance.py` follow. `--backends` and `--parts` run some
parts alone, into the same reports:

    python benchmarks/on_gpu.py --output FOLDER --backends jax --parts "steps, bfloat16" Lanczos

`--quick` tries all parts with tiny networks and little data, on a CPU too. Needs JAX with CUDA and
torch, and for the tests the package's `test` extra, where TensorFlow may be missing. Reports moved
to benchmarks/results/ enter docs/performance.md by `python benchmarks/performance.py`.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time
import traceback

FOLDER = pathlib.Path(__file__).resolve().parent
# The parts in order of value, and their shares of a backend's time. What one leaves, others get.
SHARES = {
    "steps, float32": 50,
    "gamma-hat": 15,
    "agreement with the CPU": 10,
    "side by side": 25,
    "paired differences": 5,
    "steps, bfloat16": 12,
    "steps, tf32": 8,
    "Lanczos": 5,
    "tests": 12,
}
# JAX compiles: of the time that is left it gets more than half, torch the rest.
SHARE_OF_BACKEND = {"jax": 0.6, "torch": 1.0}
TESTS = [
    "tests/backend/test_derivatives_of_functions.py",
    "tests/regularizers/test_sub_batch_perturbation.py",
    "tests/regularizers/test_sharpness_aware.py",
    "tests/flatness/test_gamma_hat.py",
]


def commands(output, quick):
    """Return the parts that are programs of their own: lists of arguments."""
    tests = ["-m", "pytest", "-q", "-n", "0" if quick else "8", "--tb=line", "-p", "no:benchmark"]
    tests += ["-W", "ignore::DeprecationWarning"]
    options = ["--quick"] if quick else ["--networks", "resnet-20", "--batch-size", "512"]
    side_by_side = [str(FOLDER / "slices_side_by_side.py"), *options, "--output", str(output)]
    return {
        "tests": [*tests, *(["tests/core/test_trace.py"] if quick else TESTS)],
        "side by side": side_by_side,
    }


def serve(connection, backend, output, quick):
    """Measure the parts whose names arrive, in a process that has imported one backend."""
    os.environ["KERAS_BACKEND"] = backend
    import on_gpu_parts

    while True:
        name, seconds = connection.recv()
        try:
            on_gpu_parts.measure(name, output, quick, time.monotonic() + seconds)
            connection.send("finished")
        except Exception as error:
            traceback.print_exc()
            connection.send(f"failed: {type(error).__name__}: {error}"[:200])


class Worker:
    """A process that measures, started when it is needed and killed when it takes too long."""

    def __init__(self, *arguments):
        self.arguments = arguments
        self.process = None

    def measure(self, name, seconds):
        """Return what became of a part that may take so many seconds."""
        context = multiprocessing.get_context("spawn")
        if self.process is None:
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other, *self.arguments), daemon=True)
            self.process.start()
            other.close()
        try:
            self.connection.send((name, seconds))
            if self.connection.poll(seconds):
                return self.connection.recv()
            outcome = "stopped"
        except (EOFError, OSError):
            outcome = "failed: its process ended"
        self.end()
        return outcome

    def end(self):
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def run_command(arguments, backend, seconds):
    """Return what became of a program that may take so many seconds."""
    # TensorFloat-32 is off, so that the tolerances of CPUs hold.
    precise = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"}
    environment = {**os.environ, **precise, "KERAS_BACKEND": backend}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=FOLDER.parent, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "stopped"
    return "finished" if done.returncode == 0 else f"failed: exit status {done.returncode}"


def run_backend(backend, names, deadline, settings):
    """Run the parts on a backend, and yield what became of each."""
    worker = Worker(backend, settings.output, settings.quick)
    programs = commands(settings.output, settings.quick)
    for i, name in enumerate(names):
        start = time.monotonic()
        share = SHARES[name] / sum(SHARES[n] for n in names[i:])
        seconds = max(0.0, deadline - start) * share
        print(f"=== {backend}, {name}: at most {seconds:.0f} s", flush=True)
        if name in programs:
            outcome = run_command(programs[name], backend, seconds)
        elif name == "side by side":
            outcome = "failed: there is no benchmarks/slices_side_by_side.py"
        else:
            outcome = worker.measure(name, seconds)
        taken = round(time.monotonic() - start, 1)
        yield {"backend": backend, "part": name, "outcome": outcome, "seconds": taken}
    worker.end()


def table(rows):
    """Return what became of each part, as Markdown."""
    lines = ["| backend | part | outcome | seconds |", "|---|---|---|---:|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines)


def parse():
    """Return the settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=pathlib.Path, required=True, help="folder of the reports")
    help = "seconds that all parts may take together (%(default)s)"
    add("--seconds", type=float, default=450, help=help)
    backends = list(SHARE_OF_BACKEND)
    add("--backends", nargs="+", choices=backends, default=backends, help="(%(default)s)")
    add("--parts", nargs="+", choices=list(SHARES), default=list(SHARES), help="(%(default)s)")
    add("--quick", action="store_true", help="try all parts with tiny networks and little data")
    settings = parser.parse_args()
    settings.output = settings.output.resolve()
    return settings


def main():
    """Run all parts on all backends, and print what became of them."""
    settings = parse()
    settings.output.mkdir(parents=True, exist_ok=True)
    package = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": package, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    end = time.monotonic() + settings.seconds
    rows = []
    for backend in settings.backends:
        share = 1.0 if backend == settings.backends[-1] else SHARE_OF_BACKEND[backend]
        deadline = time.monotonic() + share * (end - time.monotonic())
        for row in run_backend(backend, settings.parts, deadline, settings):
            rows.append(row)
            (settings.output / "on_gpu_parts.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows), flush=True)
    figures = [sys.executable, str(FOLDER / "performance.py"), "--results", str(settings.output)]
    subprocess.run([*figures, "--print"], env={**os.environ, "KERAS_BACKEND": backend})


if __name__ == "__main__":
    main()
