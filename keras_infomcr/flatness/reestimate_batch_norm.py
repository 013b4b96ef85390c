"""Batch-norm statistics that fit the weights which a model has got from elsewhere."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_infomcr import validation
from keras_infomcr.flatness.data.examples import Batches
from keras_infomcr.flatness.loss.batch_norm_statistics import reestimated_statistics
from keras_infomcr.objective import Objective


def reestimate_batch_norm(model: keras.Model, data: Any, *, batch_size: int = 128) -> None:
    """Give batch normalisation the moments of data as its statistics, in one pass.

    Moving statistics belong to the weights that they were gathered with. Where weights come from
    elsewhere, as a mean of weights does, they are wrong. Here the moving mean and variance of each
    `BatchNormalization` become the moments over all of the data together, at the model's present
    weights: in the pass, batch normalisation normalises each batch by its own moments as in
    training, and dropout and other random layers do not act. A layer that is called several times
    gets the means over its calls. Frozen layers keep their statistics, and all else in the model
    stays as it is; so does a model without batch normalisation.

    Reference: Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging Weights Leads to Wider
    Optima and Better Generalization", UAI 2018, Section 3.2 (https://arxiv.org/abs/1803.05407).

    Args:
        model: A built `keras.Model`, compiled or not.
        data: Array `[N, ...]` or dictionary of arrays; tuple `(x,)` or `(x, y)` of structures of
            arrays; or a `tf.data.Dataset`, `keras.utils.PyDataset`, torch `DataLoader` or another
            iterable of batches `x` or `(x, y)` that can be read again and has an end. Labels have
            no part. Training data are meant.
        batch_size: Integer, at least 1: examples of arrays that go through the model together.
            Data that come in batches stay in them. It acts on the statistics as it does in
            training, through the layers below. Defaults to 128.

    Raises:
        TypeError: If `model` is no `keras.Model`, or `data` are no data.
        ValueError: If the model is not built, or the data are empty, endless, or hold NaN or
            infinity.

    Example:

    ```python
    model.set_weights(mean_of_weights)
    reestimate_batch_norm(model, x_train)
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r} (of type {type(model)})"
        )
    if not model.built:
        raise ValueError(
            f"The model must be built. Received: model={model!r}. Call it on data first."
        )
    validation.integer(minimum=1, batch_size=batch_size)
    weights = [ops.copy(v) for v in model.trainable_variables]
    state = Objective(model).state()
    found = reestimated_statistics(model, inputs_of(data, batch_size), weights, state)
    for variable, value in found:
        variable.assign(ops.convert_to_tensor(value, dtype=variable.dtype))


def inputs_of(data: Any, batch_size: int = 128) -> Batches:
    """Return data, with or without labels, as batches with labels that stand for none.

    Args:
        data: As for `reestimate_batch_norm`.
        batch_size: As for `reestimate_batch_norm`.
    """
    if isinstance(data, tuple) or not _gives_batches(data):
        x = data[0] if isinstance(data, tuple) and data else data
        arrays = keras.tree.flatten(x)
        size = len(arrays[0]) if arrays and np.ndim(arrays[0]) else 0
        return Batches(x, np.zeros(size), batch_size)
    Batches(data, None, batch_size)  # refuses what cannot be read again to its end
    return Batches(_WithoutLabels(data), None, batch_size)


def _gives_batches(data: Any) -> bool:
    return not isinstance(data, (np.ndarray, dict)) and not hasattr(data, "__array__")


class _WithoutLabels:
    """Batches `(x, zeros)` of batches `x` or `(x, y)`, read anew by each iteration."""

    def __init__(self, batches: Any):
        self._batches = batches

    def __iter__(self) -> Iterator[tuple]:
        batches = self._batches
        if isinstance(batches, keras.utils.PyDataset):
            batches = (self._batches[i] for i in range(batches.num_batches))
        for batch in batches:
            x = keras.utils.unpack_x_y_sample_weight(batch)[0]
            shape = keras.tree.flatten(x)[0].shape
            yield x, np.zeros(shape[0] if len(shape) else ())
