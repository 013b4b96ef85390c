import json
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import report  # noqa: E402
import timing  # noqa: E402


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a function moves it."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def takes(clock, seconds, calls=None, name=None):
    remaining = list(seconds)

    def function():
        clock.now += remaining.pop(0)
        if calls is not None:
            calls.append(name)

    return function


def test_functions_are_called_in_turn(clock):
    calls = []
    functions = {name: takes(clock, [1.0, 2.0], calls, name) for name in "ab"}
    assert timing.in_turn(functions, 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    assert calls == ["a", "b", "a", "b"]


def test_rounds_are_repeated_until_the_least_time_has_passed(clock):
    times = timing.in_turn({"a": takes(clock, [0.25] * 9)}, 1, at_least=1.0)
    assert times == {"a": [0.25] * 4}


def test_ratios_are_taken_within_a_round():
    """In the second round the machine is ten times as slow; the median of the ratios is 2."""
    times = {"plain": [1.0, 10.0, 1.0], "other": [2.0, 20.0, 3.0]}
    assert timing.median_ratios(times, "plain") == {"plain": 1.0, "other": 2.0}
    assert timing.median_seconds(times) == {"plain": 1.0, "other": 3.0}


def test_tables_of_all_reports_go_between_the_markers(tmp_path):
    for name in ("b", "a"):
        text = json.dumps({"versions": name})
        (tmp_path / f"speed_{name}.json").write_text(text)
    path = tmp_path / "docs.md"
    path.write_text("before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter")
    report.write_docs(tmp_path, "speed", lambda r: f"table {r['versions']}\n", path)
    assert path.read_text() == (
        "before\n<!-- speed: begin -->\ntable a\n\ntable b\n<!-- speed: end -->\nafter"
    )


@pytest.mark.parametrize(
    ("benchmark", "document"),
    [
        ("sam", "step_cost.md"),
        ("loss_surface", "flatness.md"),
        ("scaling", "distributed.md"),
        ("flatness", "flatness.md"),
    ],
)
def test_documents_have_the_tables_of_the_reports(benchmark, document, tmp_path):
    """Each number in the documents comes from a JSON file of benchmarks/results."""
    module = __import__(benchmark)
    text = (BENCHMARKS.parent / "docs" / document).read_text()
    (tmp_path / document).write_text(text)
    report.write_docs(report.RESULTS, benchmark, module.table, tmp_path / document)
    assert (tmp_path / document).read_text() == text
