"""The gradients by the weights of `Embedding`."""

from collections.abc import Callable

import keras
from keras import ops

from keras_infomcr.flatness.per_example.gradient_parts import Kind, Outer
from keras_infomcr.flatness.per_example.lookups import Lookups

# The inputs pass the tap as float32, which holds smaller integers exactly.
_MOST_ROWS = 2**24


def _embedding(layer: keras.layers.Embedding) -> Callable:
    # Arrays, not the layer itself, which the gradient functions would keep alive.
    num_rows = layer.input_dim
    adapters = _adapters(layer) if layer.lora_enabled else lambda *_: {}

    def parts(inputs, upstream):
        n, *_, width = upstream.shape
        rows = ops.reshape(ops.cast(inputs, "int32"), (n, -1))
        rows = ops.where(rows < 0, rows + num_rows, rows)
        upstream = ops.reshape(upstream, (n, -1, width))
        return {
            "embeddings": lambda: [Lookups(rows, upstream)],
            **adapters(rows, upstream),
        }

    return parts


def _adapters(layer: keras.layers.Embedding) -> Callable:
    """Return what gives the parts of the two factors of low rank that are added to a table."""
    # Float32, whatever the dtype of the layer.
    down, up = layer.lora_embeddings_a.value, layer.lora_embeddings_b.value
    scale = layer.lora_alpha / layer.lora_rank

    def parts(rows, upstream):
        def of_down():
            return [Lookups(rows, scale * upstream @ ops.transpose(ops.cast(up, upstream.dtype)))]

        def of_up():
            columns = ops.cast(ops.take(down, rows, axis=0), upstream.dtype)
            return [Outer([columns], scale * upstream)]

        return {"lora_embeddings_a": of_down, "lora_embeddings_b": of_up}

    return parts


_WEIGHTS = "embeddings", "lora_embeddings_a", "lora_embeddings_b"
EMBEDDINGS = {
    keras.layers.Embedding: Kind(_embedding, _WEIGHTS, lambda layer: layer.input_dim <= _MOST_ROWS)
}
