"""Reports of benchmarks: JSON files that gather rows, and tables of them in the docs."""

import argparse
import json
import pathlib
import sys

import keras
from machine import BACKEND, device, is_gpu

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description, docs=True):
    """Return a parser of command lines with the options that all benchmarks of reports have.

    Args:
        description: String, whose first line says what the benchmark does.
        docs: Boolean, whether it writes its tables into a document. `performance.py` writes others.
    """
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    help = "folder of the JSON reports, to which this run adds its own (%(default)s)"
    found.add_argument("--output", type=pathlib.Path, default=RESULTS, help=help)
    if docs:
        help = "Markdown file: put the tables of all reports in --output between its markers"
        found.add_argument("--docs", type=pathlib.Path, help=help)
    return found


def load(folder, name, *settings):
    """Return the report of these versions on this machine, and its path.

    Args:
        folder: Path of the folder of all reports.
        name: String, the benchmark.
        *settings: Strings that tell one report of it from another, such as the precision.

    Returns:
        Tuple of a dictionary with `"versions"`, a string, and `"rows"`, a list that is empty
        unless the file holds rows of the same versions; and the path of the JSON file.
    """
    versions = f"{BACKEND} {sys.modules[BACKEND].__version__}", f"Keras {keras.__version__}"
    report = {"versions": ", ".join([*versions, device(), *settings]), "rows": []}
    kind = [name, BACKEND, "gpu" if is_gpu() else "cpu", *settings]
    path = folder / f"{'_'.join(kind)}.json"
    if path.exists() and (found := json.loads(path.read_text()))["versions"] == report["versions"]:
        report = found
    return report, path


def save(report, path):
    """Write a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def grid(head, columns, before=lambda key: (), order=None):
    """Return a Markdown table: a row a key, a column a report.

    Args:
        head: List of strings, the titles of what stands before the reports' columns.
        columns: Dictionary of dictionaries: the cells of each column, by key.
        before: Function of a key that returns further cells, such as a limit.
        order: Function of a key by which the rows are sorted, or `None`.
    """
    keys = sorted({key for cells in columns.values() for key in cells}, key=order)
    titles = [*head, *columns]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(head)}{'---:|' * len(columns)}"]
    for key in keys:
        cells = [*(k or "" for k in key), *before(key), *(c.get(key, "") for c in columns.values())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def pick(found, key, cell, where=lambda row: True):
    """Return the columns of a grid: the cells of the rows of each report by their keys."""
    columns = {
        label: {key(r): cell(r) for r in report["rows"] if where(r)}
        for label, report in found.items()
    }
    return {label: cells for label, cells in columns.items() if cells}


def write_docs(folder, name, table, path):
    """Put the tables of all reports of a benchmark between its markers in a file.

    Args:
        folder: Path of the folder of all reports.
        name: String, the benchmark.
        table: Function that turns a report into a string of Markdown.
        path: Path of the file, which has the markers already.
    """
    reports = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}_*.json"))]
    write_between_markers(path, name, "\n".join(map(table, reports)))


def write_between_markers(path, name, text):
    """Replace what stands between the two markers of a benchmark in a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")
