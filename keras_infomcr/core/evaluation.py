"""One forward and backward pass over a batch."""

from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """What a forward and backward pass over a batch gives.

    A named tuple, because all frameworks pass one through what they trace.

    Attributes:
        loss: Scalar array, the mean loss of the batch.
        gradients: List like the weights, the gradient of the loss; `None` where the loss does not
            depend on a weight.
        predictions: Structure of arrays `[B, ...]`, the outputs of the model.
        state: List of arrays like the state that the pass started from, as the pass has left it;
            `None` for an array that the pass has not changed, or if it has changed none.
    """

    loss: Any
    gradients: list
    predictions: Any = None
    state: list | None = None
