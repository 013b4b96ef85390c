import json
import math

import compare_minima
import numpy as np
import pytest
from scipy.stats import kendalltau

from keras_infomcr import flatness

# Gamma is affine in gamma-hat; the others give several numbers, or none of a model. The local
# learning coefficient came after the numbers in examples/README.md.
NOT_COMPARED = {
    "reestimate_batch_norm",
    *("gamma", "gamma_hat_by_layer", "hessian_spectral_density", "hessian_top_eigenvalues"),
    *("hessian_trace_by_layer", "local_learning_coefficient", "loss_between", "loss_surface"),
    *("pac_bayes_bound", "plot"),
}


def network(size, shifts, seed, error, measure):
    measures = {compare_minima.BASELINE: measure}
    settings = {"batch size": size, "shifts": shifts, "seed": seed}
    return {**settings, "test_error": error, "measures": measures}


def test_every_measure_of_the_package_is_compared():
    functions = {name for name in flatness.__all__ if name.islower()} - NOT_COMPARED
    assert {name.split(" ")[0].lstrip("-") for name in compare_minima.MEASURES} == functions


@pytest.mark.slow
def test_a_small_run_saves_its_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    # One measure and three of the settings: compiling takes the time.
    few = {"-local_entropy": compare_minima.MEASURES["-local_entropy"]}
    monkeypatch.setattr(compare_minima, "MEASURES", few)
    three = dict(list(compare_minima.SETTINGS.items())[:3])
    monkeypatch.setattr(compare_minima, "SETTINGS", three)
    options = ["--epochs", "2", "--seeds", "1", "--output", str(tmp_path / "new" / "folder")]
    monkeypatch.setattr("sys.argv", ["compare_minima.py", *options])
    compare_minima.main()
    folder = tmp_path / "new" / "folder"
    assert (folder / "compare_minima.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((folder / "compare_minima.json").read_text())
    models, taus = numbers["models"], numbers["tau"]
    assert len(models) == 3
    printed = capsys.readouterr().out.splitlines()
    for name in (compare_minima.BASELINE, *few):
        values, losses = (
            [m["measures"][k] for m in models] for k in (name, compare_minima.BASELINE)
        )
        errors = [m["test_error"] for m in models]
        assert taus[name]["all"] == kendalltau(values, errors).statistic
        assert taus[name]["with loss"] == kendalltau(values, losses).statistic
        [line] = [line for line in printed if line.startswith(f"{name}  ")]
        assert line.split()[-5] == f"{taus[name]['all']:+.2f}"
    assert all(m["measures"]["-local_entropy"] > 0 for m in models)


@pytest.mark.slow
def test_every_measure_runs_on_one_network():
    train_data, test_data = compare_minima.load_data()
    model = compare_minima.train(300, True, 0, 1, *train_data)
    found = compare_minima.examine(model, train_data, test_data)
    assert list(found["measures"]) == [compare_minima.BASELINE, *compare_minima.MEASURES]
    assert np.isfinite(list(found["measures"].values())).all()


def test_a_factor_is_judged_by_the_pairs_that_it_sets_apart():
    # The batch size acts as the measure says, the shifts the other way round.
    models = [
        network("small", False, 0, 0.02, 1.0),
        network("large", False, 0, 0.03, 3.0),
        network("small", True, 0, 0.01, 2.0),
        network("large", True, 0, 0.015, 4.0),
    ]
    row = compare_minima.correlations(models)[compare_minima.BASELINE]
    assert (row["batch size"], row["shifts"]) == (1, -1)
    assert math.isnan(row["seed"])


def test_pairs_of_the_same_test_error_do_not_count():
    models = [network("small", False, s, e, m) for s, (e, m) in enumerate([(1, 1), (1, 2), (2, 3)])]
    assert compare_minima.tau_between(models, compare_minima.BASELINE, "seed") == 1


def test_images_move_by_a_pixel_at_most_and_the_rest_is_background():
    image = np.full((500, 8, 8, 1), -1.0)
    image[:, 3, 4] = 1.0
    moved = compare_minima.shifted(image, np.random.default_rng(0))
    where = {tuple(at) for at in np.argwhere(moved[..., 0] > 0)[:, 1:].tolist()}
    assert where == {(3, 4), (2, 4), (4, 4), (3, 3), (3, 5)}
    assert (moved == 1).sum() == 500


@pytest.mark.parametrize(
    "tau, words", [(0.31, "track the test error"), (0.3, "fail"), (-0.31, "point the wrong way")]
)
def test_the_statement_follows_the_numbers(tau, words):
    columns = ("all", "batch size", "shifts", "seed", "with loss")
    taus = {
        compare_minima.BASELINE: dict.fromkeys(columns, 0.1),
        "the measure": dict.fromkeys(columns, tau),
    }
    first, *_ = compare_minima.statement(taus, 20)
    assert first.startswith("Over all 20 networks: ")
    if words == "fail":
        assert "all measures, the training loss among them, fail" in first
    else:
        assert f"the measure {words}" in first
