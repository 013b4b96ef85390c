"""What the quickstart says of eight seeds is what the report of them says."""

import pathlib

import numpy as np
import pytest
import quickstart

README = pathlib.Path(quickstart.__file__).parents[1] / "README.md"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_of_the_training_labels_is_wrong_and_no_test_label(seed, monkeypatch):
    (x, y), (x_test, y_test) = quickstart.load_data(seed)
    monkeypatch.setattr(quickstart, "NUM_WRONG", 0)
    (x_right, y_right), (_, y_test_right) = quickstart.load_data(seed)
    assert x.shape == (500, 8, 8, 1) and x_test.shape == (1297, 8, 8, 1)
    np.testing.assert_array_equal(x, x_right)
    assert np.sum(y != y_right) == 100 and set(y) == set(range(10))
    np.testing.assert_array_equal(y_test, y_test_right)


def made_up(plain, regularised):
    runs = dict(zip(quickstart.RUNS, (plain, regularised)))
    return {name: dict.fromkeys(quickstart.MEASURES, value) for name, value in runs.items()}


def test_comparison_is_of_pairs():
    """The differences 1, 3 and -1 have the mean 1 and the standard deviation 2."""
    pairs = (4, 5), (1, 4), (1, 0)
    rows = [{"seed": 5 + k, **made_up(*pair)} for k, pair in enumerate(pairs)]
    title, _, *lines = quickstart.comparison({"epochs": 7, "versions": "made up", "rows": rows})
    assert title.startswith("3 seeds, 5 to 7, of 7 epochs (made up)")
    cells = dict(zip(quickstart.MEASURES, lines))
    assert cells["test_loss"].split() == (
        "test loss 2.000 +- 1.732 3.000 +- 2.646 +1.000 +- 2.000 1 of 3".split()
    )
    assert cells["test_accuracy"].endswith("+100.00% +- 200.00%  2 of 3")  # larger is better
    assert cells["training_loss"].split()[-1] == "2.000"  # no winner


def test_the_report_is_of_the_present_quickstart_and_stands_in_the_readme():
    report = quickstart.load_report()
    assert report["epochs"] == quickstart.EPOCHS
    assert [row["seed"] for row in report["rows"]] == list(range(8))
    assert "\n".join(quickstart.comparison(report)) in README.read_text()
