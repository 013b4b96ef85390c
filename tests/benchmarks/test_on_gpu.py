import json
import math
import pathlib
import subprocess
import sys

import keras
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import on_gpu  # noqa: E402

BACKEND = keras.backend.backend()


class Clock:
    """A clock that parts move, in place of `time.monotonic`."""

    now = 0.0

    def monotonic(self):
        return self.now


class BadWorker:
    """A worker whose parts fail, or take all of their time and are stopped."""

    def __init__(self, *arguments):
        pass

    def measure(self, name, seconds):
        if name == "gamma-hat":
            return "failed: RuntimeError: out of memory"
        on_gpu.time.now += seconds
        return "stopped"

    def end(self):
        pass


@pytest.fixture
def bad_parts(monkeypatch):
    monkeypatch.setattr(on_gpu, "time", Clock())
    monkeypatch.setattr(on_gpu, "Worker", BadWorker)
    monkeypatch.setattr(on_gpu, "commands", lambda output, quick: {})


class Settings:
    output, quick = pathlib.Path("folder"), True


def test_all_parts_are_tried_and_end_in_time(bad_parts):
    rows = list(on_gpu.run_backend("jax", list(on_gpu.SHARES), 240.0, Settings))
    assert [row["part"] for row in rows] == list(on_gpu.SHARES)
    assert sum(row["seconds"] for row in rows) == pytest.approx(240.0, abs=1.0)
    assert all(row["seconds"] > 5 for row in rows if row["outcome"] == "stopped")


def test_the_time_that_a_part_leaves_goes_to_those_after_it(bad_parts):
    names = ["gamma-hat", "Lanczos", "tests"]  # the first fails at once
    _, second, third = on_gpu.run_backend("torch", names, 170.0, Settings)
    shares = on_gpu.SHARES["Lanczos"], on_gpu.SHARES["tests"]
    assert second["seconds"] == pytest.approx(170.0 * shares[0] / sum(shares), abs=0.1)
    assert third["seconds"] == pytest.approx(170.0 * shares[1] / sum(shares), abs=0.1)


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        ("", 60, "finished"),
        ("raise SystemExit(3)", 60, "failed: exit status 3"),
        ("import time; time.sleep(60)", 0.2, "stopped"),
    ],
)
def test_what_becomes_of_a_program(code, seconds, outcome):
    assert on_gpu.run_command(["-c", code], BACKEND, seconds) == outcome


def test_its_tests_exist():
    assert [name for name in on_gpu.TESTS if not (BENCHMARKS.parent / name).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "tensorflow", reason="It measures JAX and torch.")
def test_a_quick_run_measures_all_parts(tmp_path):
    arguments = ["--quick", "--output", str(tmp_path), "--backends", BACKEND, "--seconds", "900"]
    subprocess.run([sys.executable, str(BENCHMARKS / "on_gpu.py"), *arguments], check=True)
    outcomes = json.loads((tmp_path / "on_gpu_parts.json").read_text())
    assert {r["part"] for r in outcomes if r["outcome"] == "finished"} == set(on_gpu.SHARES)
    [steps, further] = (
        json.loads(next(tmp_path.glob(f"{name}_{BACKEND}_*.json")).read_text())["rows"]
        for name in ("step_cost", "on_gpu")
    )
    assert [r["step"] for r in steps] == ["plain", "sub_batches", "SAM"]
    assert {r["part"] for r in further} == {
        "agreement with the CPU",
        "paired differences",
        "Lanczos",
    }
    assert all(math.isfinite(r["value"]) for r in further)
