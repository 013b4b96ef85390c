"""The quickstart does what its text says, and says of eight seeds what the report of them says."""

import json
import pathlib
import sys

import numpy as np
import pytest
from images import digits

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"
sys.path.append(str(ROOT / "benchmarks"))
import quickstart_seeds  # noqa: E402


def run_until(heading):
    """Run the script up to a heading; return its variables."""
    code, _ = QUICKSTART.read_text().split(f'"""\n## {heading}\n')
    variables = {"__file__": str(QUICKSTART)}
    exec(compile(code, QUICKSTART, "exec"), variables)
    return variables


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_of_the_training_labels_is_wrong_and_no_test_label(seed, monkeypatch):
    monkeypatch.setenv("QUICKSTART_SEED", str(seed))
    found = run_until("Model")
    x, y = digits(seed)
    np.testing.assert_array_equal(np.concatenate([found["x_train"], found["x_test"]]), x)
    assert found["x_train"].shape == (500, 8, 8, 1) and found["y_train"].shape == (500,)
    assert np.sum(found["y_train"] != y[:500]) == 100
    assert set(found["y_train"]) == set(range(10))
    np.testing.assert_array_equal(found["y_test"], y[500:])


@pytest.mark.slow
def test_two_epochs_give_all_numbers_and_a_picture(monkeypatch, tmp_path):
    for name in ("SEED", "EPOCHS", "OUTPUT"):  # set anew by the run, and restored after it
        monkeypatch.setenv(f"QUICKSTART_{name}", "")
    found = quickstart_seeds.run_quickstart(seed=3, epochs=2, folder=tmp_path)
    for run in found["runs"].values():
        assert set(run) == {*quickstart_seeds.MEASURES, "seconds"}
        assert np.isfinite(list(run.values())).all()
    plain, regularised = found["plain_history"], found["regularised_history"]
    # The same weights and batches until then: some units of the last place, by threads.
    np.testing.assert_allclose(plain["loss"][0], regularised["loss"][0], rtol=1e-4)
    assert np.isnan(regularised["infomcr_reg"][0]) and regularised["infomcr_reg"][1] > 0
    assert "infomcr_reg" not in plain
    assert (tmp_path / "quickstart.png").read_bytes()[:4] == b"\x89PNG"


def made_up(plain, regularised):
    runs = {"plain": plain, "regularised": regularised}
    return {name: dict.fromkeys(quickstart_seeds.MEASURES, v) for name, v in runs.items()}


def test_comparison_is_of_pairs():
    """The differences 1, 3 and -1 have the mean 1 and the standard deviation 2."""
    pairs = (4, 5), (1, 4), (1, 0)
    rows = [{"seed": 5 + k, **made_up(*pair)} for k, pair in enumerate(pairs)]
    report = {"epochs": 7, "versions": "made up", "rows": rows}
    title, versions, _, *lines = quickstart_seeds.comparison(report)
    assert title.startswith("3 seeds, 5 to 7, 7 epochs each")
    assert versions == "(made up)"
    cells = dict(zip(quickstart_seeds.MEASURES, lines))
    assert cells["test_loss"].split() == (
        "test loss 2.000 +- 1.732 3.000 +- 2.646 +1.000 +- 2.000 1 of 3".split()
    )
    assert cells["test_accuracy"].endswith("+100.00% +- 200.00%  2 of 3")  # larger is better
    assert cells["training_loss"].split()[-1] == "2.000"  # no winner


@pytest.mark.parametrize("path", [ROOT / "README.md", QUICKSTART], ids=lambda path: path.name)
def test_the_report_is_of_the_present_quickstart_and_stands_in_the_docs(path):
    results = ROOT / "benchmarks" / "results" / "quickstart_seeds_tensorflow_cpu.json"
    report = json.loads(results.read_text())
    assert report["epochs"] == run_until("Data")["num_epochs"]
    assert [row["seed"] for row in report["rows"]] == list(range(8))
    assert "\n".join(quickstart_seeds.comparison(report)) in path.read_text()
