"""The comparison of methods: what its numbers mean, that runs pair, and that its page is right."""

import inspect
import json
import pathlib
import re

import compare_methods
import keras
import numpy as np
import pytest
from images import digits
from scipy import stats

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SharpnessAware, WeightNoise

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
SCRIPT = ROOT / "examples" / "compare_methods.py"
WRONG = "10 % wrong labels"


def rows_of(plain, other):
    """Return rows of two methods with these accuracies, the last seed first."""
    pairs = {compare_methods.PLAIN: plain, "SAM": other}
    return [
        {"labels": WRONG, "method": method, "seed": seed, "accuracy": accuracy}
        for method, accuracies in pairs.items()
        for seed, accuracy in reversed(list(enumerate(accuracies)))
    ]


def test_methods_are_compared_by_paired_differences(rng):
    plain, sam = rng.uniform(0.8, 0.9, size=(2, 8))
    found = compare_methods.compare(rows_of(plain, sam), WRONG, "SAM")
    expected = stats.ttest_rel(100 * sam, 100 * plain)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found["mean"], 100 * (sam - plain).mean(), rtol=1e-12)
    np.testing.assert_allclose([found["low"], found["high"]], interval, rtol=1e-9)
    # SciPy flips signs of pairs, too, all of them where they are few.
    flips = stats.permutation_test(
        (sam, plain), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert found["p"] == pytest.approx(flips.pvalue, rel=1e-12)


def test_eight_differences_of_one_sign_have_the_smallest_p():
    assert compare_methods.sign_flip_p(np.arange(1.0, 9.0)) == 2 / 2**8


def test_differences_of_zero_are_no_evidence():
    assert compare_methods.sign_flip_p(np.zeros(5)) == 1


@pytest.mark.parametrize(
    "low, high, word",
    [(0.1, 2, "better"), (-2, -0.1, "worse"), (-0.5, 0.4, "alike"), (-0.6, 0.1, "open")],
)
def test_verdict_follows_the_interval(low, high, word):
    assert compare_methods.verdict({"low": low, "high": high}) == word


def test_tuning_takes_the_largest_mean_accuracy_then_the_smallest_loss():
    _, values = compare_methods.GRIDS["SAM"]
    accuracies = [(0.9, 0.5), (0.8, 0.8), (0.7, 0.9), (0.7, 0.9)]
    rows = [
        {"labels": WRONG, "method": "SAM", "value": v, "accuracy": a, "loss": loss}
        for v, pair, loss in zip(values, accuracies, (0.1, 0.5, 0.4, 0.6))
        for a in pair
    ]
    assert compare_methods.best_value(rows, WRONG, "SAM") == values[2]


def test_tuned_values_are_of_the_grids():
    for labels in compare_methods.SHARES_WRONG:
        chosen = compare_methods.TUNED[labels]
        assert list(chosen) == list(compare_methods.GRIDS)
        for method, (_, values) in compare_methods.GRIDS.items():
            assert chosen[method] in values


@pytest.mark.parametrize("seed", [0, 1])
def test_test_digits_are_the_same_for_all_seeds_and_in_no_training(seed):
    x, y = digits(seed=0)
    right, wrong = (compare_methods.load_data(k, seed) for k in compare_methods.SHARES_WRONG)
    assert np.sum(right["training"][1] != wrong["training"][1]) == 50
    for data in right, wrong:
        np.testing.assert_array_equal(data["test"][0], x[900:])
        np.testing.assert_array_equal(data["test"][1], y[900:])
        pool = np.concatenate([data["training"][0], data["validation"][0]])
        assert sorted(map(bytes, pool)) == sorted(map(bytes, x[:900]))
        np.testing.assert_array_equal(data["validation"][1], right["validation"][1])


@pytest.mark.slow
def test_methods_without_strength_train_as_the_plain_run(monkeypatch):
    """The runs share weights and batches, whatever their methods draw beforehand."""
    rules = {"SAM": lambda: SharpnessAware(strength=0.0), "noise": lambda: WeightNoise(std=0.0)}
    monkeypatch.setattr(
        compare_methods, "regularizer", lambda method, *_: rules.get(method, lambda: None)()
    )
    x, y = compare_methods.load_data(WRONG, 3)["training"]
    plain, *others = (
        compare_methods.train(method, 0.9, 0.05, 2, 3, x, y)
        for method in (compare_methods.PLAIN, *rules, "averaging")
    )
    expected = plain.predict(x[:50], verbose=0)
    for model in others[:-1]:
        # Other batches or weights would change the logits in their first digit.
        np.testing.assert_allclose(model.predict(x[:50], verbose=0), expected, atol=1e-3)
    # The mean of one epoch: the weights are the plain run's, the statistics those of the data.
    for mean, weight in zip(others[-1].trainable_variables, plain.trainable_variables):
        np.testing.assert_allclose(mean.numpy(), weight.numpy(), atol=1e-4)


@pytest.mark.slow
def test_a_small_run_saves_its_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    few = {k: compare_methods.GRIDS[k] for k in (compare_methods.PLAIN, "SAM, last 30 %")}
    monkeypatch.setattr(compare_methods, "GRIDS", few)
    monkeypatch.setattr(compare_methods, "SHARES_WRONG", {WRONG: 0.1})
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- compare_methods: begin -->\nold\n<!-- compare_methods: end -->\nafter"
    )
    options = ["--seeds", "2", "--epochs", "2", "--processes", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compare_methods.py", *options])
    compare_methods.main()
    assert (tmp_path / "compare_methods.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "compare_methods.json").read_text())
    assert len(report["rows"]) == 2 * 2
    text = compare_methods.table(report)
    assert text in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["compare_methods.py", *options, "--docs", str(page)])
    compare_methods.main()
    before, after = "before\n<!-- compare_methods: begin -->\n", "<!-- compare_methods: end -->"
    assert page.read_text() == f"{before}{text}{after}\nafter"


def test_tuning_tries_every_value_on_validation_data(monkeypatch):
    """The plain run's rate goes to the other methods; the best of made-up runs is found."""
    few = {k: compare_methods.GRIDS[k] for k in (compare_methods.PLAIN, "SAM")}
    monkeypatch.setattr(compare_methods, "GRIDS", few)
    jobs = []

    def run(job):
        jobs.append(job)
        return job | {"accuracy": -abs(job["value"] - 0.1), "loss": 0.0}

    monkeypatch.setattr(compare_methods, "run", run)
    best = compare_methods.tune(epochs=2, processes=1, methods=list(few))
    assert best == dict.fromkeys(compare_methods.SHARES_WRONG, dict.fromkeys(few, 0.1))
    assert len(jobs) == 2 * 2 * 4 * 2
    assert {job["split"] for job in jobs} == {"validation"}
    assert {job["rate"] for job in jobs if job["method"] == "SAM"} == {0.1}


@pytest.mark.parametrize("path", [PAGE, SCRIPT], ids=lambda path: path.name)
def test_the_report_is_of_the_present_settings_and_stands_in_the_docs(path):
    report = json.loads((ROOT / "docs" / "compare_methods.json").read_text())
    for row in report["rows"]:
        assert row["value"] == compare_methods.TUNED[row["labels"]][row["method"]]
        assert row["split"] == "test"
    seeds = 2 * len(compare_methods.GRIDS) * [*range(8)]
    assert [row["seed"] for row in report["rows"]] == seeds
    text = path.read_text()
    assert compare_methods.table(report) in text
    text = " ".join(text.split())
    # What the text says in words.
    gains = [
        compare_methods.compare(report["rows"], WRONG, method)["mean"]
        for method in ("SAM", "SAM, last 30 %", "m-SAM", "ASAM", "noise", "spectral radius")
    ]
    assert f"gain {min(gains):.1f} to {max(gains):.1f} points" in text
    for method in (compare_methods.PLAIN, "m-SAM"):
        chosen = [r for r in report["rows"] if (r["labels"], r["method"]) == (WRONG, method)]
        share = np.mean([r["training_accuracy"] for r in chosen])
        assert f"with {share:.0%}".replace("%", " %") in text


def test_every_rule_and_its_options_stand_on_the_page():
    text = PAGE.read_text()
    for name in ("adaptive", "num_sub_batches", "strength", "direction"):
        assert name in inspect.signature(SharpnessAware).parameters and f"`{name}=" in text


@pytest.mark.slow
def test_the_snippets_of_the_page_run():
    inputs = keras.Input((3,))
    x, y = np.random.default_rng(0).normal(size=(32, 3)).astype("float32"), np.arange(32) % 2
    names = {
        "keras": keras,
        "model": RegularizedModel(inputs, keras.layers.Dense(2)(inputs)),
        "x_train": x,
        "y_train": y,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("\n### ")
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    for weight in names["model"].get_weights():
        assert np.isfinite(weight).all()
