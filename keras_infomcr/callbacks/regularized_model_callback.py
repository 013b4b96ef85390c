"""What the callbacks that steer a regulariser share."""

import keras

from keras_infomcr.models.regularized_model import RegularizedModel


class RegularizedModelCallback(keras.callbacks.Callback):
    """A callback that acts on the regulariser of a `RegularizedModel`."""

    def set_model(self, model):
        """Attach the callback to a model.

        Raises:
            ValueError: If the model is no `RegularizedModel` compiled with a regulariser.
        """
        if getattr(model, "regularizer", None) is None or not isinstance(model, RegularizedModel):
            raise ValueError(
                f"`{type(self).__name__}` needs a `RegularizedModel` compiled with a regulariser. "
                f"Received: model={model!r} (of type {type(model)}). Make the model with "
                "`RegularizedModel.from_model(model)` and do not compile it with "
                "`regularizer=None`."
            )
        super().set_model(model)
        # `self.model` makes Keras on JAX reattach the state of `fit`, which the gate needs not.
        self._gated_model = model
