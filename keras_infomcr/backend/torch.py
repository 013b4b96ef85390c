"""torch: differentiation of functions of weights, and the training step.

Private names of Keras used here, unchanged from 3.10 to 3.15, because Keras's own `train_step`
uses them too: `_compute_loss`, `_loss_tracker`, `_call_has_training_arg`; and `_flatten_layers`
(the one list of all layers, nested ones included), `_value` of a variable.
"""

import contextlib
import warnings

import keras
import torch


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

    def product(weights, vector, *args):
        # The fused kernels of attention have no second derivative.
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with _true_float32(), torch.enable_grad(), attention:
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
    """Return the outputs, with the modules of torch among the layers at the variables' values."""
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.TorchModuleWrapper):
                stack.enter_context(_at_variables(layer))
        return model(x, **kwargs)


@contextlib.contextmanager
def _at_variables(layer):
    """Let a module, which holds its parameters itself, see a `StatelessScope`; keep its buffers."""
    values = {id(v._value): v.value for v in layer.variables}
    tensors = {name: values[id(p)] for name, p in layer.module.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in layer.module.named_buffers()}
    training_before = layer.training

    def call(*args, training=None, **kwargs):
        layer.train(training is not False)
        return torch.func.functional_call(layer.module, tensors, args, kwargs)

    object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        object.__delattr__(layer, "call")
        layer.train(training_before)


def add(gradient, term):
    """Return gradient + term."""
    return gradient + term


def apply(optimizer, gradients, variables):
    """Take the optimizer's step."""
    optimizer.apply(gradients, variables)


def train_step(step, model, data):
    """Return the logs of the step."""
    with torch.no_grad():
        # Moved to the device once: the sub-batches are slices of it.
        return step(keras.tree.map_structure(_as_tensor, data))


def _as_tensor(array):
    return None if array is None else keras.ops.convert_to_tensor(array)


def passed_with_metrics(variables):
    """Return none: a step reads and assigns any variable."""
    return []


def making_train_function(model):
    """Do nothing: each train function is compiled by itself, and variables keep their values."""
    return contextlib.nullcontext()


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


def num_replicas():
    """Return 1."""
    return 1


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
    if not value.requires_grad:
        return [None] * len(weights)
    return list(torch.autograd.grad(value, weights, allow_unused=True, **kwargs))


def _leaves(weights):
    return [w.detach().requires_grad_() for w in weights]


def _detached(structure):
    return keras.tree.map_structure(lambda a: a.detach() if torch.is_tensor(a) else a, structure)
