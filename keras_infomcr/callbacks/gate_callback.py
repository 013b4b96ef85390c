"""What the callbacks that open the gate share."""

from keras_infomcr import validation
from keras_infomcr.callbacks.regularized_model_callback import RegularizedModelCallback


class GateCallback(RegularizedModelCallback):
    """A callback that closes the gate when training begins, and opens it once.

    Args:
        verbose: 0 or 1. With 1, a line is printed when the gate opens.
    """

    def __init__(self, verbose: int):
        super().__init__()
        validation.one_of(0, 1, verbose=verbose)
        self.verbose = verbose

    def on_train_begin(self, logs=None):
        self._gate_before = self.model.regularizer_active
        self.model.regularizer_active = False
        self._epoch = None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_end(self, logs=None):
        if self._epoch is None:  # there was no epoch to train
            self.model.regularizer_active = self._gate_before
        elif not self.model.regularizer_active:
            self._warn_of_no_start()

    def _warn_of_no_start(self):
        """Warn that the regulariser has not acted in this call of `fit`."""
        raise NotImplementedError

    def _open(self, why: str):
        self.model.regularizer_active = True
        if self.verbose:
            print(f"Epoch {self._epoch + 1}: the regulariser starts. {why}")
