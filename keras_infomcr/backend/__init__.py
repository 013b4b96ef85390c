"""The one door to the framework: what each of the folders `tensorflow`, `jax`, `torch` provides.

The folders hold the same files, one a section below. Arrays are the framework's own; `weights` and
`state` are lists of them.

`differentiation`: derivatives of functions of weights. A gradient is dense, and `None` where the
value does not depend on the weight. Derivatives are taken in true float32 at least, wherever the
framework lets this be asked for, and in a training step on each replica as if it were alone:
layers synchronise nothing, and no loss is divided. `compiled` asks for compilation, which torch has
no use for.

* `value_and_grad(function)`: `f(weights, *args) -> ((value, auxiliary), gradients)` of a
  `function(weights, *args) -> (value, auxiliary)`.
* `value_grad_and_hessian_product(function)`: `f(weights, vector, *args) -> ((value, auxiliary),
  gradients, products)` of such a function: H v, with v a list like the weights or `None` for the
  gradient.
* `linearized_gradient(function)`: `f(weights, *args) -> (gradients, product)` of such a function,
  with `product` a function `vector -> products` for one vector after another, which shares the
  pass over the data.
* `curvature_gradient(function)`: `f(weights, vector, *args) -> gradients` of v^T H v by the
  weights, v held constant: third derivatives.
* `hessian_vector_products(function, compiled)`: `f(weights, vectors, *args) -> products` of a
  `function(weights, *args) -> value`, with K vectors at once: `vectors[k]` and `products[k]` have
  shape `[K, *weights[k].shape]`; a product may be `None` for zeros.
* `jacobian(function, compiled)`: `f(weights, context, *args) -> (values, rows)` of a
  `function(weights, context, *args) -> values` of shape `[n]` and the widest float type; `rows[k]`
  has shape `[n, *weights[k].shape]`.
* `gradients_by_example(function, compiled)`: the same, faster, of a function whose `values[i]`
  depends on row i of each of `args` alone.
* `add_to_gradient(gradient, term)`: a gradient by the trainer, which may be sparse, and a dense
  array, added.
* `has_sparse_gradients()`: whether the trainer's gradient by the table of an embedding is sparse,
  with a row for each use of an entry.
* `interpolated(start, end, share)`: (1 - share) start + share end, exactly `start` at 0 and `end`
  at 1, in one pass over the arrays where the framework offers one.
* `plus_multiple(array, factor, term)`: array + factor * term, the factor a float, in one pass where
  the framework offers one.
* `widest_float()`: the name of the widest float type.
* `float64_allowed()`: a context in which arrays of float64 can be made and used.
* `low_precision_products()`: whether float32 matrix products round like half precision.

`control_flow`: what is compiled, and what is traced once for several uses.

* `compiled(function)`: the function, compiled; itself on torch.
* `is_traced(array)`: whether an array stands for numbers that are not known yet.
* `traced_once(function)`: the function, traced once for all the places that call it, if the
  framework gains by it.
* `rolled_into_loop(accumulate, compiled)`: a function like `core.sub_batch_averages.accumulate`
  that is traced once for all its steps, or adds in place, if the framework gains by it; else
  `accumulate` itself. `compiled` says whether XLA or the like compiles TensorFlow's graph.
* `cond(predicate, true_function, false_function)`: what the function chosen by a scalar array
  returns; both return the same structure of arrays and `None`.
* `delayed_until(array, other)`: the array, whose use waits until `other` has been computed, so that
  memory is not taken earlier than need be; the array itself, where the framework sees to that.
* `batch_size(batch)`: an integer, or a scalar array where it is not known while tracing.
* `slice_rows(array, start, length)`: rows of a dense, ragged or sparse array.
* `sum_by_number(rows, numbers, count)`: `[count, ...]`, sums of the rows `[n, ...]` that have the
  numbers `[n]`, in the dtype of the rows, as `keras.ops.segment_sum` on torch is not.

`random`: what unseeded random layers draw from.

* `random_state()`: its state as a list of arrays; empty where the framework has no such state.
* `set_random_state(state)`: set it.

`distribution`: devices, replicas and processes.

* `devices(model)`: a list of the devices of this process that share the model's batches; `[None]`
  unless there are several.
* `on_device(device, function, *args)`: what the function returns of the arguments, computed there.
* `makes_variables_in_steps()`: whether a compiled step may make variables, in its first call.
* `variables_of(model)`: a context in which to make variables beside those of a model.
* `num_replicas(model)`: how many replicas share a batch of the model.
* `num_parallel_steps(model)`: how many steps run side by side on shares of a batch, each on its
  loss divided by that number, so that the optimizer can add up their gradients.
* `mean_over_steps(array)`: the mean of an array over these steps.
* `mean_over_replicas(arrays)`: the means of a list of arrays over the replicas, on each of them, in
  a function that `over_replicas` calls.
* `replica_index()`: there, the number of the replica, an integer or a scalar array.
* `over_replicas(function)`: `f(batch) -> means, predictions` of such a function. Where one step is
  for several replicas, the function is called on each replica's share of the batch; its
  floating-point means are averaged over the replicas, and its predictions are concatenated.
* `is_chief(model)`: whether this process is the one that writes files.
* `wait_for_workers(model)`: return when all processes that train the model have come here.

`evaluation`: calls of any `keras.Model` at weights other than the values of its variables.

* `forward(model, x, **kwargs)`: the outputs, called as Keras's training step calls the model.
* `modules_at_variables(model)`: a context in which layers that are modules of the framework, and
  hold their tensors themselves, use the present values of the variables and keep their state.
* `without_rematerialization()`: a context in which `keras.RematScope` and `keras.remat` do nothing,
  where the framework computes anew in a backward pass that has left the scope of the evaluation.
* `functions_may_hide_weights()`: whether functions that `keras.remat` has made give no gradient by
  weights other than variables.
* `assigns_in_place()`: whether what a layer assigns when it is called takes effect at once, so that
  no gradient goes through it. Else it is a part of what is differentiated, and what is assigned to
  trainable weights is dropped by Keras's training step.

`trainer`: `Trainer`, a base of `RegularizedModel`; its contract is `backend.trainer.BaseTrainer`.
"""

import importlib

import keras

_BACKENDS = ("tensorflow", "jax", "torch")

if keras.backend.backend() not in _BACKENDS:
    raise ImportError(
        f"keras_infomcr runs on these backends of Keras: {', '.join(_BACKENDS)}. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of them before Keras is imported."
    )


def _file(name):
    return importlib.import_module(f"keras_infomcr.backend.{keras.backend.backend()}.{name}")


_differentiation = _file("differentiation")
value_and_grad = _differentiation.value_and_grad
value_grad_and_hessian_product = _differentiation.value_grad_and_hessian_product
linearized_gradient = _differentiation.linearized_gradient
curvature_gradient = _differentiation.curvature_gradient
hessian_vector_products = _differentiation.hessian_vector_products
jacobian = _differentiation.jacobian
gradients_by_example = _differentiation.gradients_by_example
add_to_gradient = _differentiation.add_to_gradient
has_sparse_gradients = _differentiation.has_sparse_gradients
interpolated = _differentiation.interpolated
plus_multiple = _differentiation.plus_multiple
widest_float = _differentiation.widest_float
float64_allowed = _differentiation.float64_allowed
low_precision_products = _differentiation.low_precision_products

_control_flow = _file("control_flow")
compiled = _control_flow.compiled
is_traced = _control_flow.is_traced
traced_once = _control_flow.traced_once
rolled_into_loop = _control_flow.rolled_into_loop
cond = _control_flow.cond
delayed_until = _control_flow.delayed_until
batch_size = _control_flow.batch_size
slice_rows = _control_flow.slice_rows
sum_by_number = _control_flow.sum_by_number

_random = _file("random")
random_state = _random.random_state
set_random_state = _random.set_random_state

_distribution = _file("distribution")
devices = _distribution.devices
on_device = _distribution.on_device
makes_variables_in_steps = _distribution.makes_variables_in_steps
variables_of = _distribution.variables_of
num_replicas = _distribution.num_replicas
num_parallel_steps = _distribution.num_parallel_steps
mean_over_steps = _distribution.mean_over_steps
mean_over_replicas = _distribution.mean_over_replicas
replica_index = _distribution.replica_index
over_replicas = _distribution.over_replicas
is_chief = _distribution.is_chief
wait_for_workers = _distribution.wait_for_workers

_evaluation = _file("evaluation")
forward = _evaluation.forward
modules_at_variables = _evaluation.modules_at_variables
without_rematerialization = _evaluation.without_rematerialization
functions_may_hide_weights = _evaluation.functions_may_hide_weights
assigns_in_place = _evaluation.assigns_in_place

Trainer = _file("trainer").Trainer
