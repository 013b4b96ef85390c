"""The shares of a batch: each replica of a `ReplicatedModel` sees one."""

from typing import Any

import keras
from keras import ops

from keras_infomcr.keras_internals import (
    get_keras_mask,
    known_logits,
    note_logits,
    set_keras_mask,
)
from keras_infomcr.objective import Batch, joined
from keras_infomcr.objective.batch import SubBatches


def shares(batch: Batch, count: int) -> list[tuple[Any, Batch]]:
    """Cut a batch into contiguous shares, whose sizes differ by at most one.

    Returns:
        List of `count` pairs: the size of a share as a fraction of the batch, a float or a scalar
        array, and the share. Where a batch has fewer examples the surplus shares repeat one, and
        their fraction is 0.
    """
    if count == 1:
        return [(1.0, batch)]
    parts = SubBatches(batch, count)
    found = [parts[k] for k in range(len(parts))]
    found = [(weight / len(parts), part) for weight, part in found]
    return found + [(0.0, found[-1][1])] * (count - len(found))


def shares_of_outputs(batch: Batch, count: int) -> list[tuple[Any, Batch]]:
    """Cut a batch whose `x` are predictions, with what Keras has noted on them."""
    outputs = keras.tree.flatten(batch.x)
    notes = [get_keras_mask(a) for a in outputs], [known_logits(a) for a in outputs]
    found = shares(batch._replace(x=(batch.x, *notes)), count)
    for _, part in found:
        for output, mask, logits in zip(keras.tree.flatten(part.x[0]), *part.x[1:]):
            if mask is not None:
                set_keras_mask(output, mask)
            if logits is not None:
                note_logits(output, logits)
    return [(fraction, part._replace(x=part.x[0])) for fraction, part in found]


def joined_outputs(parts: list, size: Any) -> Any:
    """Return the predictions of a batch of some size, with what Keras has noted on the parts."""
    if len(parts) == 1:
        return parts[0]
    whole = joined(parts, size)
    for output, *pieces in zip(*map(keras.tree.flatten, (whole, *parts))):
        logits = [known_logits(piece) for piece in pieces]
        if all(part is not None for part in logits):
            note_logits(output, ops.concatenate(logits, axis=0)[:size])
    return whole
