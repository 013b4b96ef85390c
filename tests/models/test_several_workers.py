"""Training by two processes: `MultiWorkerMirroredStrategy`, JAX's `DataParallel`."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import worker
from frameworks import BACKEND

pytestmark = pytest.mark.slow  # each process starts TensorFlow or JAX anew

if BACKEND == "torch":
    pytest.skip("On torch, Keras trains in one process.", allow_module_level=True)


def addresses():
    """Return two addresses that are free."""
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return [f"127.0.0.1:{port}" for port in ports]


def start(folder, killed_at=None, **options):
    """Start both workers and return their processes; the second may kill itself at a step."""
    cluster = addresses()
    processes = []
    for index in range(2):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        chosen = {"folder": str(folder), "index": index} | options
        if index == 1:
            chosen["killed_at"] = killed_at
        if BACKEND == "tensorflow":
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": task})
        else:
            chosen["addresses"] = cluster
        command = [sys.executable, worker.__file__, json.dumps(chosen)]
        with open(folder / f"{index}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def logs(folder):
    """Return the last lines that both workers printed."""
    return "\n\n".join((folder / f"{index}.log").read_text()[-3000:] for index in range(2))


def run(folder, **options):
    """Let both workers train; return the results of each."""
    processes = start(folder, **options)
    try:
        for process in processes:
            assert process.wait(timeout=300) == 0, logs(folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [dict(np.load(folder / f"{index}.npz")) for index in range(2)]


def assert_equal_to_one_device(results, folder, **options):
    expected = worker.train(folder, **options)
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name], err_msg=name)
        wanted = expected[name][-len(values) :]
        # Sums in another order change each number by 1e-15 of it. Twelve steps and the
        # determinant in gamma-hat multiply that.
        np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    return tmp_path / "one", tmp_path / "two"


def test_two_workers_train_as_one_device(folders, float64):
    """All logs agree, gamma-hat among them. Only the chief worker writes files."""
    one, two = folders
    results = run(two, synchronized=True)
    assert np.isnan(results[0]["infomcr_reg"][0]) and results[0]["infomcr_reg"][-1] > 0
    assert_equal_to_one_device(results, one, synchronized=True)
    assert (two / "0.weights.h5").exists() and (two / "0.keras").exists()
    assert not (two / "1.weights.h5").exists() and not (two / "1.keras").exists()


def test_killed_worker_resumes_to_the_same_trajectory(folders, float64):
    """One worker is killed in the third epoch, with the gate open; the other cannot go on."""
    one, two = folders
    first, second = start(two, killed_at=8)
    try:
        assert second.wait(timeout=300) == -signal.SIGKILL, logs(two)
    finally:
        first.kill()
        first.wait()
    results = run(two)
    assert len(results[0]["loss"]) == worker.EPOCHS - 2
    assert_equal_to_one_device(results, one)
