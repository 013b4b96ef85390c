"""torch: differentiation of functions of weights, and the training step.

Private names of Keras used here, unchanged from 3.10 to 3.15, because Keras's own `train_step`
uses them too: `_compute_loss`, `_loss_tracker`, `_call_has_training_arg`; and `_flatten_layers`
(the one list of all layers, nested ones included), `_value` of a variable, the functions for masks.
"""

import contextlib
import warnings

import keras
import torch
import torch.utils.checkpoint
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask


def value_and_grad(function):
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""

    def differentiated(weights, *args):
        with _true_float32(), torch.enable_grad():
            weights = _leaves(weights)
            value, auxiliary = function(weights, *args)
            gradients = _gradients(value, weights)
        return _detached((value, auxiliary)), gradients

    return differentiated


def hessian_vector_product(function):
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""

    @torch.compiler.disable  # compiled functions have no second derivative
    def product(weights, vector, *args):
        with _true_float32(), torch.enable_grad(), _twice_differentiable():
            weights = _leaves(weights)
            value, auxiliary = function(weights, *args)
            gradients = _gradients(value, weights, create_graph=True)
            slope = torch.zeros_like(value)
            for g, v in zip(gradients, vector or gradients):
                if g is not None:
                    slope = slope + (g * v.detach()).sum()
            products = _gradients(slope, weights)
        return _detached((value, auxiliary)), _detached(gradients), products

    return product


def hessian_vector_products(function, compiled=True):
    """Return `f(weights, vectors, *args) -> products`."""

    def products(weights, vectors, *args):
        with _true_float32(), torch.enable_grad(), _twice_differentiable():
            weights = _leaves(weights)
            gradients = _gradients(function(weights, *args), weights, create_graph=True)
            # Those that depend on a weight.
            known = [k for k, g in enumerate(gradients) if g is not None and g.requires_grad]
            gradients, vectors = ([some[k] for k in known] for some in (gradients, vectors))
            found = [
                torch.autograd.grad(gradients, weights, v, retain_graph=True, allow_unused=True)
                for v in zip(*vectors)
            ]
        if not found:
            return [None] * len(weights)
        return [None if p[0] is None else torch.stack(p) for p in zip(*found)]

    return products


@contextlib.contextmanager
def _twice_differentiable():
    """Let torch use operations that have second derivatives."""
    # The fused kernels of attention have none.
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with attention, _ShiftAfterLayerNorm():
        yield


class _ShiftAfterLayerNorm(torch.overrides.TorchFunctionMode):
    """Add the shift of a layer normalisation without scale last: fused in, it fails in torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        shift_last = weight is None and bias is not None
        fused = None if shift_last else bias
        output = torch.nn.functional.layer_norm(input, normalized_shape, weight, fused, eps)
        return output + bias if shift_last else output


def compiled(function):
    """Return the function."""
    return function


def devices(model):
    """Return the one device, by the name of `None`."""
    return [None]


def on_device(device, function, *args):
    """Return what the function returns."""
    return function(*args)


def after(array, other):
    """Return the array: operations run in the order in which they are called."""
    return array


def is_traced(array):
    """Return whether the array stands for numbers that are not known yet, within `vmap`."""
    return torch._C._functorch.is_batchedtensor(array)  # there is no public name for it


def float64_allowed():
    """Do nothing: they always can."""
    return contextlib.nullcontext()


def jacobian(function, coupled, compiled=True):
    """Return `f(weights, context, *args) -> (values, rows)`."""

    def whole(weights, context, *args):
        with _true_float32(), torch.enable_grad():
            weights = _leaves(weights)
            values = function(weights, context, *args)
            rows = [_gradients(v, weights, retain_graph=True) for v in values]
        zeros = [torch.zeros_like(w) for w in weights]
        rows = [[z if g is None else g for z, g in zip(zeros, row)] for row in rows]
        return values.detach(), [torch.stack(r) for r in zip(*rows)]

    def by_example(weights, context, *args):
        args = keras.tree.map_structure(_as_tensor, args)
        try:
            return vectorized(weights, context, *args)
        except RuntimeError:  # an operation that torch cannot vectorise
            chunks = [
                whole(
                    weights, context, *keras.tree.map_structure(lambda a, i=i: a[i : i + 1], args)
                )
                for i in range(batch_size(args))
            ]
            values, rows = zip(*chunks)
            return torch.cat(values), [torch.cat(r) for r in zip(*rows)]

    def vectorized(weights, context, *args):
        def one(weights, args):
            args = keras.tree.map_structure(lambda a: a[None], args)
            return function(weights, context, *args)[0]

        of_all = torch.func.vmap(torch.func.grad_and_value(one), in_dims=(None, 0))
        with _true_float32(), torch.enable_grad(), _AnyMemoryFormat(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            rows, values = of_all([w.detach() for w in weights], args)
        return values, rows

    return whole if coupled else by_example


class _AnyMemoryFormat(torch.overrides.TorchFunctionMode):
    """Take any layout for the one that Keras's convolutions ask for, as `vmap` knows only one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.is_contiguous and "memory_format" in kwargs:
            return True
        return function(*args, **kwargs)


def traced_once(function):
    """Return the function."""
    return function


def looped(accumulate, compiled):
    """Return `accumulate`."""
    return accumulate


def cond(predicate, true_function, false_function):
    """Call one of two functions."""
    return true_function() if predicate else false_function()


def main_pass(model, x, y, sample_weight):
    """Run Keras's forward and backward pass, which leaves the `.grad` of parameters alone."""
    kwargs = {"training": True} if model._call_has_training_arg else {}
    with torch.enable_grad():
        y_pred = model(x, **kwargs)
        loss = model._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )
        model._loss_tracker.update_state(loss, sample_weight=batch_size(x))
        loss = model.optimizer.scale_loss(loss)
        return y_pred, _gradients(loss, [v.value for v in model.trainable_variables])


def forward(model, x, **kwargs):
    """Return the outputs."""
    return model(x, **kwargs)


@contextlib.contextmanager
def modules_at_variables(model):
    """Let torch modules among the layers, which hold their tensors themselves, see the scope."""
    layers = [x for x in model._flatten_layers() if isinstance(x, keras.layers.TorchModuleWrapper)]
    values = {id(v._value): v.value for layer in layers for v in layer.variables}
    modules = [module for layer in layers for module in layer.modules()]
    modes = [(module, module.training) for module in modules]
    tensors = [
        (entries, name, tensor)
        for module in modules
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None
    ]
    for entries, name, tensor in tensors:
        entries[name] = values[id(tensor)] if id(tensor) in values else tensor.clone()
    try:
        yield
    finally:
        for entries, name, tensor in tensors:
            entries[name] = tensor
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_rematerialization():
    """Call what `torch.utils.checkpoint` would call again in the backward pass once only.

    Private name of torch used here, unchanged from 2.1 to 2.13, for those who have imported the
    function `checkpoint` before: `_checkpoint_without_reentrant_generator`, which it calls.
    """

    def called(function, *args, use_reentrant=None, **kwargs):
        return function(*args, **kwargs)

    def around_the_call(*args, **kwargs):
        yield

    replacements = {
        "checkpoint": called,
        "_checkpoint_without_reentrant_generator": around_the_call,
    }
    module = torch.utils.checkpoint
    originals = {name: getattr(module, name) for name in replacements if hasattr(module, name)}
    for name in originals:
        setattr(module, name, replacements[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def functions_may_hide_weights():
    """Return `False`: `torch.utils.checkpoint` sees all tensors."""
    return False


def assigns_in_place():
    """Return `True`: there is one value of each variable at a time."""
    return True


def add(gradient, term):
    """Return gradient + term."""
    return gradient + term


def apply(optimizer, gradients, variables):
    """Take the optimizer's step."""
    # As in Keras, a parameter that was frozen by its `requires_grad` stays.
    frozen = [not v.value.requires_grad for v in variables]
    optimizer.apply([None if f else g for f, g in zip(frozen, gradients)], variables)


def train_step(step, model, data):
    """Return the logs of the step."""
    with torch.no_grad():
        # Moved to the device once: the sub-batches are slices of it.
        return step(keras.tree.map_structure(_as_tensor, data))


def _as_tensor(array):
    return None if array is None else keras.ops.convert_to_tensor(array)


def passed_with_metrics(model, variables):
    """Return none: a step reads and assigns any variable."""
    return []


def making_function(model, name):
    """Do nothing: each train function is compiled by itself, and variables keep their values."""
    return contextlib.nullcontext()


def marked_as_step(model, function):
    """Return the function."""
    return function


def batch_size(batch):
    """Return the number of examples."""
    return next(a for a in keras.tree.flatten(batch) if a is not None).shape[0]


def slice_rows(array, start, length):
    """Return rows of a tensor."""
    return array[start : start + length]


def random_state():
    """Return the states of the generators that unseeded `Dropout` layers draw from."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def set_random_state(state):
    """Set the states of these generators."""
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda)


def attach_state(model):
    """Do nothing: variables hold their values at all times."""


def widest_float():
    """Return `"float64"`, `"float32"` on devices of Apple, which have no other."""
    device = keras.ops.zeros(()).device.type
    return "float32" if device == "mps" else "float64"


def variables_of(model):
    """Do nothing: there is one replica."""
    return contextlib.nullcontext()


def num_replicas(model):
    """Return 1: `fit` knows of no other process."""
    return 1


num_parallel_steps = num_replicas


def mean_over_steps(array):
    """Return the array."""
    return array


def over_replicas(function):
    """Return the function."""
    return function


def agree_on_overflow(optimizer):
    """Do nothing: there is one replica."""


def own_batch(model, iterator):
    """Return `None`: Keras builds the model from any batch."""


def reducible(model, step):
    """Return the step."""
    return step


def is_chief(model):
    """Return `True`."""
    return True


def wait_for_workers(model):
    """Return at once."""


def low_precision_products():
    """Return `False`: TensorFloat-32 is switched off where it matters."""
    return False


@contextlib.contextmanager
def _true_float32():
    """Let an NVIDIA GPU compute float32 matrix products in float32, not in TensorFloat-32."""
    if not torch.cuda.is_available():
        yield
        return
    before = [(flag, name, getattr(flag, name)) for flag, name, _ in _precision_flags()]
    for flag, name, value in _precision_flags():
        setattr(flag, name, value)
    try:
        yield
    finally:
        for flag, name, value in before:
            setattr(flag, name, value)


def _precision_flags():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    if hasattr(cuda.matmul, "fp32_precision"):  # torch 2.9, which forbids to mix it with the old
        return [(op, "fp32_precision", "ieee") for op in (cuda.matmul, cudnn.conv, cudnn.rnn)]
    return [(op, "allow_tf32", False) for op in (cuda.matmul, cudnn)]


def _gradients(value, weights, **kwargs):
    needed = [w for w in weights if w.requires_grad]
    if not value.requires_grad or not needed:
        return [None] * len(weights)
    gradients = iter(torch.autograd.grad(value, needed, allow_unused=True, **kwargs))
    return [next(gradients) if w.requires_grad else None for w in weights]


def _leaves(weights):
    return [w.detach().requires_grad_() for w in weights]


def _detached(structure):
    return keras.tree.map_structure(_detached_array, structure)


def _detached_array(array):
    if not torch.is_tensor(array):
        return array
    detached = array.detach()
    set_keras_mask(detached, get_keras_mask(array))
    return detached
