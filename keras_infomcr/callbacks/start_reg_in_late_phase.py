"""The gate of the regulariser, opened for the last epochs of a run."""

import warnings

from keras_infomcr import validation
from keras_infomcr.callbacks.gate_callback import GateCallback


class StartRegInLatePhase(GateCallback):
    """Start the regulariser for the last part of the epochs, whatever the learning rate does.

    The gate `model.regularizer_active` is closed when training begins and opened at the beginning
    of the epoch `epochs - n`, with n the number of epochs that `last_fraction` of all comes to,
    rounded, and at least one. `epochs` is what `fit` was given, so that a run which is resumed, by
    `BackupAndRestore` or with `initial_epoch`, opens the gate in the same epoch as one that was
    not interrupted. Where the learning rate drops in steps, `StartRegAfterLRDrop` opens the gate
    with the first of them; a cosine falls below its `ratio` in mid-training already.

    A step with a closed gate is Keras's own. If a regularised step costs c plain ones, the whole
    run costs 1 + last_fraction (c - 1) plain runs: 1.3 with sharpness-aware minimisation (c = 2)
    and the default.

    Two studies find that sharpness-aware minimisation in the last part of training alone gives
    nearly all that it gives throughout: in a few epochs of 160 (Zhou et al., a wide residual
    network on CIFAR-10), and in one whole decay of the learning rate over the last 30 % of the
    steps (Temperon; in the middle of a decay it gained nothing).

    Args:
        last_fraction: Float in (0, 1]. The part of all epochs that is regularised. Defaults to
            0.3.
        verbose: 0 or 1. With 1, a line is printed when the gate opens. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range, or, in `fit`, if the model has no
            regulariser.

    Example:

    ```python
    model.fit(x, y, epochs=100, callbacks=[StartRegInLatePhase(0.3)])  # acts in epochs 71 to 100
    ```

    Reference: Zhou et al., ICLR 2025 (https://arxiv.org/abs/2410.10373); Temperon, 2026
    (https://arxiv.org/abs/2609.17575).
    """

    def __init__(self, last_fraction: float = 0.3, verbose: int = 0):
        super().__init__(verbose)
        validation.fraction(last_fraction=last_fraction)
        self.last_fraction = last_fraction

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch)
        if epoch >= self._first_epoch() and not self._gated_model.regularizer_active:
            epochs = self.params["epochs"]
            self._open(f"These are the last {epochs - epoch} of {epochs} epochs.")

    def _first_epoch(self) -> int:
        """Return the epoch, counted from 0, at which the gate opens."""
        epochs = self.params["epochs"]
        return epochs - max(1, round(self.last_fraction * epochs))

    def _warn_of_no_start(self):
        warnings.warn(
            f"The regulariser never started: training ended before epoch {self._first_epoch() + 1} "
            f"of {self.params['epochs']}. Received: last_fraction={self.last_fraction}. Give `fit` "
            "the number of epochs that will be trained, or increase `last_fraction`.",
            stacklevel=3,
        )
