"""Count what a training step communicates, regularised and plain, on 1, 2 and 4 devices.

On TensorFlow the devices are those of a `MirroredStrategy`, whose sums over replicas are counted as
the step is traced. On JAX they are those of a `keras.distribution.DataParallel`, and the collective
operations are those of the program that XLA compiles. Nothing is timed.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py

prints the table and keeps it as JSON in benchmarks/results/; `--docs FILE` puts the tables of all
JSON files there between the markers of a Markdown file, without counting. KERAS_BACKEND chooses the
backend, TensorFlow or JAX. Where there are not so many GPUs, CPU devices stand in for them.
"""

import argparse
import json
import os
import re
import subprocess
import sys

import keras
import models
import numpy as np
import report as reports
from machine import BACKEND

from keras_infomcr import RegularizedModel
from keras_infomcr.regularizers import SubBatchPerturbation

NUM_SUB_BATCHES, BATCH_SIZE = 4, 64
STEPS = {
    "plain": None,
    "sub_batches": {"main_gradient": "sub_batches"},
    "full_batch": {"main_gradient": "full_batch"},
}
SYNCHRONIZED = ", synchronised"


def make(network, options):
    """Return a compiled model, without options a plain `keras.Model`; and a batch for it."""
    name = network.removesuffix(SYNCHRONIZED)
    if options is None:
        model = models.make(name)
    else:
        regularizer = SubBatchPerturbation(num_sub_batches=NUM_SUB_BATCHES, **options)
        model = models.make(name, RegularizedModel, regularizer=regularizer)
    for layer in models.batch_norms(model):
        layer.synchronized = network.endswith(SYNCHRONIZED)
    return model, models.random_data(model, BATCH_SIZE)


def count_tensorflow(num_devices):
    """Return a function `(network, options) -> list of the bytes of each sum over replicas`."""
    import tensorflow as tf

    devices = [f"GPU:{i}" for i in range(len(tf.config.list_physical_devices("GPU")))]
    if len(devices) < num_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * num_devices
        tf.config.set_logical_device_configuration(cpu, parts)
        devices = [f"CPU:{i}" for i in range(num_devices)]
    found = []

    class Counted(tf.distribute.ReductionToOneDevice):
        def reduce_implementation(self, reduce_op, per_replica_value, *args, **kwargs):
            found.append(per_replica_value.values[0])
            return super().reduce_implementation(reduce_op, per_replica_value, *args, **kwargs)

    strategy = tf.distribute.MirroredStrategy(devices[:num_devices], Counted())

    def count(network, options):
        with strategy.scope():
            model, data = make(network, options)
            model.optimizer.build(model.trainable_variables)
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(BATCH_SIZE)
        model.evaluate(dataset, verbose=0)  # builds the metrics, which a step may not do
        found.clear()
        [batch] = strategy.experimental_distribute_dataset(dataset)
        step = tf.function(lambda b: strategy.run(model.train_step, (b,)), autograph=False)
        step.get_concrete_function(batch)
        return [value.dtype.size * int(np.prod(value.shape)) for value in found]

    return count


def count_jax(num_devices):
    """Return a function `(network, options) -> list of the bytes of each collective operation`."""
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
    devices = jax.devices() if jax.device_count() >= num_devices else jax.devices("cpu")
    names = [f"{d.platform}:{d.id}" for d in devices[:num_devices]]
    distribution = keras.distribution.DataParallel(devices=names)
    keras.distribution.set_distribution(distribution)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

    def count(network, options):
        model, batch = make(network, options)
        model.optimizer.build(model.trainable_variables)
        data = [
            jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout) for a in batch
        ]
        model.evaluate(*batch, verbose=0)  # builds the metrics, which a step may not do
        lists = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        state = tuple([v.value for v in variables] for variables in lists)
        shardings = jax.tree.map(lambda a: a.sharding, state)
        step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
        program = step.lower(state, tuple(data)).compile().as_text()
        results = re.findall(rf"= (\S.*?) (?:{kinds})(?:-start)?\(", program)
        return [sum(map(size_of, re.findall(r"([a-z]+\d*)\[([\d,]*)\]", r))) for r in results]

    return count


def size_of(array):
    """Return the bytes of an array in a program: its type and its dimensions, as text."""
    kind, dimensions = array
    bits = int(re.sub(r"\D", "", kind) or 8)
    return bits // 8 * int(np.prod([int(n) for n in dimensions.split(",") if n]))


def measure(networks, num_devices):
    """Return the rows of some networks on so many devices."""
    count = {"tensorflow": count_tensorflow, "jax": count_jax}[BACKEND](num_devices)
    rows = []
    for network in networks:
        for step, options in STEPS.items():
            sizes = count(network, options)
            rows.append(
                {
                    "network": network,
                    "devices": num_devices,
                    "step": step,
                    "sums": len(sizes),
                    "bytes": sum(sizes),
                }
            )
    return rows


def table(report):
    """Return the rows of a report as a Markdown table."""
    lines = [
        f"**batch {BATCH_SIZE}, M = {NUM_SUB_BATCHES}** ({report['versions']})",
        "",
        "| network | devices | step | sums over devices | bytes | bytes, times plain |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for r in report["rows"]:
        if r["step"] == "plain":
            plain = r["bytes"]
        ratio = f"{r['bytes'] / plain:.3f}" if plain else ""
        cells = r["network"], r["devices"], r["step"], r["sums"], r["bytes"], ratio
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", ""])


def parse():
    """Return the options of the command line."""
    parser = reports.parser(__doc__)
    add = parser.add_argument
    networks = ["mlp", "resnet-20"]
    if BACKEND == "tensorflow":  # on JAX batch normalisation is synchronised anyway
        networks.append(f"resnet-20{SYNCHRONIZED}")
    help = f"networks; `{SYNCHRONIZED}` after a name synchronises batch normalisation (%(default)s)"
    add("--networks", nargs="+", default=networks, help=help)
    help = "numbers of devices (%(default)s)"
    add("--devices", nargs="+", type=int, default=[1, 2, 4], help=help)
    add("--quick", action="store_true", help="count only for the perceptron on 2 devices")
    # What this script calls itself with, in a process for each number of devices.
    add("--rows", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Count each number of devices in a process of its own, whose devices are made at its start."""
    options = parse()
    if options.docs:
        reports.write_docs(options.output, "scaling", table, options.docs)
        return
    if BACKEND == "torch":
        print("Keras on torch trains on one device: there is nothing to count.")
        return
    if options.quick:
        options.networks, options.devices = ["mlp"], [2]
    if options.rows:
        print(json.dumps(measure(options.networks, *options.devices)))
        return
    report, path = reports.load(options.output, "scaling")
    report["rows"] = []
    for num_devices in options.devices:
        arguments = ["--rows", "--devices", str(num_devices), "--networks", *options.networks]
        found = subprocess.run(
            [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
        report["rows"] += json.loads(found.stdout.splitlines()[-1])
    report["rows"].sort(key=lambda r: options.networks.index(r["network"]))
    reports.save(report, path)
    print(table(report))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
