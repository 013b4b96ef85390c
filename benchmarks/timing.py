"""The one way in which the benchmarks time functions: in turn, round after round."""

import statistics
import time
from collections.abc import Callable


def seconds_of(function: Callable) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: dict[str, Callable], rounds: int, at_least: float = 0.0):
    """Call all functions one after the other, and that again and again.

    Whatever else the machine does slows all functions of one round alike. So their ratios within a
    round say more than times that were measured one function after another. Call each function
    once beforehand, so that nothing is compiled while the clock runs.

    Args:
        functions: Dictionary of functions without arguments.
        rounds: Integer, the least number of rounds.
        at_least: Float, the least number of seconds: short rounds are repeated until it has passed.

    Returns:
        Dictionary of lists: the seconds that each function took, one number a round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < at_least:
        for name, function in functions.items():
            times[name].append(seconds_of(function))
        done += 1
    return times


def median_seconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of the seconds of each function."""
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratios(times: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Return the median, over the rounds, of each function's time divided by the baseline's."""
    return {
        name: statistics.median(t / b for t, b in zip(values, times[baseline]))
        for name, values in times.items()
    }
