"""The loss and the 0-1 error at many weights."""

from collections.abc import Iterable

import numpy as np

from keras_infomcr.flatness.loss.batch_norm_statistics import reestimated_state
from keras_infomcr.flatness.loss.zero_one_error import LossAndError
from keras_infomcr.flatness.running.progress import progress_bar


def losses_and_errors(
    function: LossAndError,
    data: Iterable,
    points: Iterable[tuple[np.ndarray, list]],
    num_points: int,
    reestimate: bool,
    verbose: int,
) -> np.ndarray:
    """Return the loss and the 0-1 error at each point, an array `[2, num_points]`.

    Args:
        function: The `LossAndError` of the model.
        data: Iterable of batches `(x, y)` of NumPy arrays, which can be read again.
        points: Iterable of pairs of the weights, an array `[W]`, and the state, a list of arrays.
        num_points: Integer, how many there are.
        reestimate: Boolean, whether batch normalisation gets the statistics of the data there.
        verbose: 0 or 1.
    """
    found = []
    with progress_bar(num_points, verbose) as progress:
        for weights, state in points:
            there = reestimated_state(function, data, weights, state) if reestimate else state
            found.append(function.loss_and_error(data, weights, there))
            progress.add(1)
    return np.transpose(found)
