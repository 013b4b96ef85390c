"""The one door to the framework: what a backend module provides.

Arrays are the framework's own; `weights` and `state` are lists of them. A gradient is dense, and
`None` where the value does not depend on the weight. The derivatives of functions are taken in true
float32 at least, wherever the framework lets this be asked for, and in a training step on each
replica as if it were alone: layers synchronise nothing, and no loss is divided.

* `value_and_grad(function)`: `f(weights, *args) -> ((value, auxiliary), gradients)` of a
  `function(weights, *args) -> (value, auxiliary)`.
* `hessian_vector_product(function)`: `f(weights, vector, *args) -> ((value, auxiliary), gradients,
  products)` of such a function: H v, with v a list like the weights or `None` for the gradient.
* `hessian_vector_products(function, compiled)`: `f(weights, vectors, *args) -> products` of a
  `function(weights, *args) -> value`, with K vectors at once: `vectors[k]` and `products[k]` have
  shape `[K, *weights[k].shape]`; a product may be `None` for zeros.
* `jacobian(function, coupled, compiled)`: `f(weights, context, *args) -> (values, rows)` of a
  `function(weights, context, *args) -> values` of shape `[n]` and the widest float type; `rows[k]`
  has shape `[n, *weights[k].shape]`. Unless `coupled`, `values[i]` depends on row i of each of
  `args` alone. `compiled` asks for compilation, which torch has no use for.
* `compiled(function)`: the function, compiled; itself on torch.
* `devices(model)`: a list of the devices of this process that share the model's batches; `[None]`
  unless there are several.
* `on_device(device, function, *args)`: what the function returns of the arguments, computed there.
* `after(array, other)`: the array, not used before another is known, so that memory is not taken
  earlier than need be; itself, where the framework sees to that.
* `is_traced(array)`: whether an array stands for numbers that are not known yet.
* `float64_allowed()`: a context in which arrays of float64 can be made and used.
* `traced_once(function)`: the function, traced once for all the places that call it, if the
  framework gains by it.
* `looped(accumulate, compiled)`: a function like `core.sub_batch_averages.accumulate` that is
  traced once for all its steps, if the framework gains by it; else `accumulate` itself. `compiled`
  says whether XLA or the like compiles what is traced.
* `cond(predicate, true_function, false_function)`: what the function chosen by a scalar array
  returns; both return the same structure of arrays and `None`.
* `main_pass(model, x, y, sample_weight)`: Keras's own forward and backward pass, with all its
  effects on variables; returns the predictions and the gradients, scaled, perhaps sparse.
* `forward(model, x, **kwargs)`: the outputs, with the layers in the mode of that pass.
* `modules_at_variables(model)`: a context in which layers that are modules of the framework, and
  hold their tensors themselves, use the present values of the variables and keep their state.
* `without_rematerialization()`: a context in which `keras.RematScope` and `keras.remat` do nothing,
  where the framework computes anew in a backward pass that has left the scope of the evaluation.
* `functions_may_hide_weights()`: whether functions that `keras.remat` has made give no gradient by
  weights other than variables.
* `assigns_in_place()`: whether what a layer assigns when it is called takes effect at once, so that
  no gradient goes through it. Else it is a part of what is differentiated, and what is assigned to
  trainable weights is dropped by Keras's training step.
* `add(gradient, term)`: a gradient of `main_pass` and a dense array, added.
* `apply(optimizer, gradients, variables)`: the optimizer's step.
* `train_step(step, model, *args)`: what Keras's `train_step(*args)` returns, of a function
  `step(data) -> logs` that reads and assigns variables.
* `passed_with_metrics(model, variables)`: those that reach a step only beside the model's metrics.
* `making_function(model, name)`: a context in which Keras makes the function of the name `"train"`
  or `"test"`, within which `attach_state` does nothing. It shares nothing compiled with those made
  before, shows a user's step no variables but Keras's, and loses none if a training step fails.
* `batch_size(batch)`: an integer, or a scalar array where it is not known while tracing.
* `slice_rows(array, start, length)`: rows of a dense, ragged or sparse array.
* `random_state()`, `set_random_state(state)`: what unseeded random layers draw from, as a list of
  arrays; empty where the framework has no such state.
* `attach_state(model)`: let a model that is in `fit` hold the present values of its variables.
* `marked_as_step(model, function)`: a predict function, within which `attach_state` does nothing.
* `widest_float()`: the name of the widest float type.
* `variables_of(model)`: a context in which to make variables beside those of a model.
* `num_replicas(model)`: how many replicas share a batch of the model.
* `num_parallel_steps(model)`: how many steps run side by side on shares of a batch, each on its
  loss divided by that number, so that the optimizer can add up their gradients.
* `mean_over_steps(array)`: the mean of an array over these steps.
* `over_replicas(function)`: `f(batch) -> means, predictions` of such a function. Where one step is
  for several replicas, it is called on the share of each; of the means, those of a float type are
  averaged over them, and the predictions are joined.
* `agree_on_overflow(optimizer)`: let a `LossScaleOptimizer` skip a step on all replicas if the
  gradients of one overflow.
* `own_batch(model, iterator)`: the first batch of what Keras iterates over, the share of one
  replica, if the model is to be built from that; else `None`.
* `reducible(model, step)`: a train or test step whose logs Keras can average over workers.
* `is_chief(model)`: whether this process is the one that writes files.
* `wait_for_workers(model)`: return when all processes that train the model have come here.
* `low_precision_products()`: whether float32 matrix products round like half precision.
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

_module = importlib.import_module(f"keras_infomcr.backend.{keras.backend.backend()}")

add = _module.add
after = _module.after
agree_on_overflow = _module.agree_on_overflow
apply = _module.apply
assigns_in_place = _module.assigns_in_place
attach_state = _module.attach_state
batch_size = _module.batch_size
compiled = _module.compiled
cond = _module.cond
devices = _module.devices
float64_allowed = _module.float64_allowed
forward = _module.forward
functions_may_hide_weights = _module.functions_may_hide_weights
hessian_vector_product = _module.hessian_vector_product
hessian_vector_products = _module.hessian_vector_products
is_chief = _module.is_chief
is_traced = _module.is_traced
jacobian = _module.jacobian
looped = _module.looped
low_precision_products = _module.low_precision_products
main_pass = _module.main_pass
making_function = _module.making_function
marked_as_step = _module.marked_as_step
mean_over_steps = _module.mean_over_steps
modules_at_variables = _module.modules_at_variables
num_parallel_steps = _module.num_parallel_steps
num_replicas = _module.num_replicas
on_device = _module.on_device
over_replicas = _module.over_replicas
own_batch = _module.own_batch
passed_with_metrics = _module.passed_with_metrics
random_state = _module.random_state
reducible = _module.reducible
set_random_state = _module.set_random_state
slice_rows = _module.slice_rows
traced_once = _module.traced_once
train_step = _module.train_step
value_and_grad = _module.value_and_grad
variables_of = _module.variables_of
wait_for_workers = _module.wait_for_workers
widest_float = _module.widest_float
without_rematerialization = _module.without_rematerialization
