"""The one door to the framework: what a backend module provides.

Arrays are the framework's own; `weights` and `state` are lists of them, in the order of
`model.trainable_variables` and `model.non_trainable_variables`.

* `train_step(model, data)`: one step of Keras's `train_step`, regularised.
* `value_and_grad(function)`: `f(weights, *args) -> ((value, auxiliary), gradients)` of a
  `function(weights, *args) -> (value, auxiliary)`; gradients are dense, `None` where the value
  does not depend on the weight.
* `jacobian(function, coupled, compiled)`: `f(weights, *args) -> (values, rows)` of a
  `function(weights, *args) -> values` of shape `[n]`, float64; `rows[k]` has shape
  `[n, *weights[k].shape]`. Unless `coupled`, `values[i]` depends on row i of each of `args` alone.
* `sub_batches(batch, count, fixed_size)`: M nearly equal contiguous slices of a batch.
* `num_replicas()`: how many replicas share the batch.
* `low_precision_products()`: whether float32 matrix products round like half precision.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_infomcr.backend.tensorflow import (
        jacobian,
        low_precision_products,
        num_replicas,
        sub_batches,
        train_step,
        value_and_grad,
    )
else:
    raise ImportError(
        "keras_infomcr runs on the TensorFlow backend of Keras. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set the environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

__all__ = [
    "jacobian",
    "low_precision_products",
    "num_replicas",
    "sub_batches",
    "train_step",
    "value_and_grad",
]
