import json
import pathlib
import sys

import keras
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import machine  # noqa: E402
import performance  # noqa: E402
import step_cost  # noqa: E402


def test_the_document_has_the_tables_of_the_reports(tmp_path):
    """Each number in its tables comes from a JSON file of benchmarks/results."""
    text = performance.DOCS.read_text()
    (tmp_path / "performance.md").write_text(text)
    performance.write(performance.reports.RESULTS, tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == text


def test_each_kind_of_step_has_a_limit():
    kinds = {*step_cost.regularizers(8), "literal", "3 replicas"}
    assert kinds == set(performance.ARITHMETIC)


def save(folder, name, **row):
    report = {"versions": f"those of {name}", "rows": [row]}
    (folder / f"{name}.json").write_text(json.dumps(report))


STEP = {"network": "mlp", "batch size": 128, "M": 8, "step": "sub_batches", "seconds": 0.5}


def test_a_column_for_each_backend_beside_the_limit(tmp_path):
    save(tmp_path, "step_cost_torch_cpu_float32", **STEP, ratio=2.5)
    save(tmp_path, "step_cost_jax_cpu_float32", **STEP, ratio=2.125)
    save(tmp_path, "step_cost_jax_gpu_float32", **STEP, ratio=9.0)
    lines = performance.step_times(tmp_path).splitlines()
    assert lines[0] == "* JAX: those of step_cost_jax_cpu_float32"
    assert lines[3] == "| network | step | arithmetic | JAX | torch |"
    assert lines[5:] == ["| mlp | sub_batches | 2 | 2.12 | 2.50 |"]


def test_a_column_for_each_precision_beside_the_target_of_batches_of_512(tmp_path):
    step = STEP | {"batch size": 512}
    save(tmp_path, "step_cost_jax_gpu_float32", **step, ratio=2.0)
    save(tmp_path, "step_cost_jax_gpu_bfloat16", **step, ratio=3.0)
    lines = performance.gpu_steps(tmp_path).splitlines()
    head = "| network | batch | step | arithmetic | target | JAX, bfloat16 | JAX |"
    assert lines[3] == head
    assert lines[5:] == ["| mlp | 512 | sub_batches | 2 | 2.1 | 3.00 | 2.00 |"]


def test_gamma_hat_stands_beside_its_literal_form(tmp_path):
    trial = {"network": "mlp", "weights": 10, "examples": 100}
    rows = [trial | {"kind": k, "ratio": r} for k, r in [("gamma-hat", 1.5), ("literal", 90.0)]]
    path = tmp_path / "gamma_hat_torch_cpu.json"
    path.write_text(json.dumps({"versions": "all", "rows": rows}))
    assert performance.gamma_hat(tmp_path).splitlines()[2:] == [
        "| network | weights | N' | torch (target 2.5) | Eq. 5 to the letter, torch |",
        "|---|---|---|---:|---:|",
        "| mlp | 10 | 100 | 1.50 | 90.00 |",
    ]


def test_bytes_are_relative_to_a_plain_step_on_as_many_devices(tmp_path):
    sent = {("plain", 2): 10, ("full_batch", 2): 25, ("plain", 4): 100, ("full_batch", 4): 100}
    rows = [{"network": "mlp", "step": s, "devices": n, "bytes": b} for (s, n), b in sent.items()]
    path = tmp_path / "scaling_jax_cpu.json"
    path.write_text(json.dumps({"versions": "all", "rows": rows}))
    assert performance.several_devices(tmp_path).splitlines()[2:] == [
        "| mlp | full_batch | 1 | 2.500 | 1.000 |"
    ]


def test_the_peak_of_a_step_holds_its_activations():
    """The backward pass needs the outputs of 2048 units for 2048 examples: 16 MiB in float32."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(2048, "tanh")(inputs)))
    model.compile("sgd", "mse", jit_compile=machine.BACKEND == "jax")
    x = keras.ops.convert_to_numpy(keras.random.normal((2048, 1), seed=0))

    def step():
        model.train_on_batch(x, x)

    _, of_programs = machine.first_call(step)
    peak = machine.peak_memory(step, of_programs)
    if peak is None:
        pytest.skip("Nothing counts the memory of this device.")
    # A few arrays of that size at once, but not all that a step makes on its way.
    assert 16 <= peak < 100
