"""Reports of benchmarks: JSON files that gather rows, and tables of them in the docs."""

import json
import sys

import keras
from machine import BACKEND, device, is_gpu


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


def write_docs(folder, name, table, path):
    """Put the tables of all reports of a benchmark between the markers of a Markdown file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    reports = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}_*.json"))]
    head, rest = path.read_text().split(begin)
    tables = "\n".join(map(table, reports))
    path.write_text(f"{head}{begin}\n{tables}{end}{rest.split(end)[1]}")
