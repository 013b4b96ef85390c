"""Two minima on one page: what it is drawn from, and that it can be read."""

import itertools
import pathlib

import look_at_a_minimum
import numpy as np
import pytest
from images import digits

pyplot = pytest.importorskip("matplotlib.pyplot")

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_fifth_of_the_training_labels_is_wrong_and_no_test_label():
    (x_train, y_train), (x_test, y_test) = look_at_a_minimum.load_data()
    images, labels = digits(np.random.default_rng(0))
    np.testing.assert_array_equal(np.concatenate([x_train, x_test]), images.reshape(-1, 64))
    wrong = np.concatenate([y_train, y_test]) != labels
    assert len(x_train) == 500
    assert wrong[:100].all()
    assert not wrong[100:].any()


def test_the_table_has_a_column_for_each_network():
    rows = ("training loss", "test accuracy", "largest eigenvalue", "trace of the Hessian")
    found = {name: dict.fromkeys(rows, value) for name, value in (("one", 0.5), ("other", 20.0))}
    header, *lines = look_at_a_minimum.table(found)
    assert header.split() == ["one", "other"]
    assert [line.split()[-2:] for line in lines] == [["0.5", "20"]] * 4
    assert tuple(line[:22].strip() for line in lines) == rows


@pytest.mark.slow
def test_a_small_run_prints_a_table_and_saves_a_page_that_can_be_read(
    tmp_path, monkeypatch, capsys
):
    pages = []
    draw = look_at_a_minimum.draw
    monkeypatch.setattr(look_at_a_minimum, "draw", lambda *a: pages.append(draw(*a)) or pages[0])
    options = ["--steps", "8", "--points", "3", "--output", str(tmp_path / "new" / "folder")]
    monkeypatch.setattr("sys.argv", ["look_at_a_minimum.py", *options])
    look_at_a_minimum.main()
    page = tmp_path / "new" / "folder" / "look_at_a_minimum.png"
    assert page.read_bytes()[:4] == b"\x89PNG"
    header, *lines = capsys.readouterr().out.splitlines()[:5]
    assert header.split("  ")[-1].strip() == "SAM"
    assert all(np.isfinite(float(number)) for line in lines for number in line.split()[-2:])
    (figure,) = pages
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_ylabel() or axes.get_xlabel().startswith("trace")
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [t.get_window_extent() for t in ticks if t.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 9
    assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
    pyplot.close(figure)


@pytest.mark.slow
def test_both_networks_start_at_the_same_weights():
    data, _ = look_at_a_minimum.load_data()
    first, second = (
        look_at_a_minimum.train(make(), data, 4, seed=1)
        for make in look_at_a_minimum.REGULARIZERS.values()
    )
    (_, record, spectra), (_, other, others) = first, second
    assert record["hessian_eigenvalue_1"][0] == other["hessian_eigenvalue_1"][0]
    assert record["hessian_eigenvalue_1"][-1] != other["hessian_eigenvalue_1"][-1]
    assert list(spectra) == list(others) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(spectra[0].grid, others[0].grid)
    np.testing.assert_array_equal(record["step"], [0, 1, 2, 3, 4])


def test_the_page_stands_in_the_readme():
    assert "docs/look_at_a_minimum.png" in (ROOT / "README.md").read_text()
    assert (ROOT / "docs" / "look_at_a_minimum.png").stat().st_size < 300_000
