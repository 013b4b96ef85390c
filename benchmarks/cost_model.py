"""Estimate what a regularised step costs on R GPUs, from arithmetic alone; nothing is run.

    python benchmarks/cost_model.py

prints the table of docs/distributed.md. A step computes, then sums the gradients over the GPUs in a
ring, each sending 2 (R-1)/R times the bytes of the gradients; the two do not overlap here. The
regulariser multiplies the first by 2 or 3 passes and leaves the second.
"""

import keras
import numpy as np
from models import NETWORKS

NUM_GPUS = 8
# NVIDIA gives 67 TFLOP/s for an H100; convolutions in true float32 may reach half.
FLOPS = 0.5 * 67e12
# Nominal bytes a second in each direction: NVLink 4, PCIe 4 x16, 100 Gbit/s Ethernet.
LINKS = {"NVLink": 450e9, "PCIe 4": 32e9, "100 Gbit/s": 12.5e9}


def multiplications(model):
    """Return the multiplications of a forward pass on one image."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            total += layer.kernel.shape.num_elements() * int(np.prod(layer.output.shape[1:3]))
        elif isinstance(layer, keras.layers.Dense):
            total += layer.kernel.shape.num_elements()
    return total


def cases():
    """Yield the name, the number of weights and the operations of a pass on one GPU."""
    for name, batch_size in (("resnet-20", 128), ("wrn-28-10", 128)):
        model = keras.Model(*NETWORKS[name]())
        # Forwards once, backwards twice; a multiplication and an addition each.
        operations = 6 * batch_size * multiplications(model)
        yield f"{name}, batch {batch_size}", model.count_params(), operations
    weights, tokens = 1e9, 8 * 2048
    yield "transformer, 8 x 2048 tokens", weights, 6 * weights * tokens


def main():
    """Print the table."""
    passes = "plain step | 2 passes | 3 passes"
    print(f"| model on each GPU | weights | pass, ms | link | sum, ms | {passes} |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for name, weights, operations in cases():
        compute = 1e3 * operations / FLOPS
        for link, bandwidth in LINKS.items():
            communicate = 1e3 * 2 * (NUM_GPUS - 1) / NUM_GPUS * 4 * weights / bandwidth
            shares = [f"{100 * k * compute / (k * compute + communicate):.0f} %" for k in (1, 2, 3)]
            cells = name, f"{weights / 1e6:,.1f} M", f"{compute:,.1f}", link, f"{communicate:,.2f}"
            print(f"| {' | '.join([*cells, *shares])} |")


if __name__ == "__main__":
    main()
