"""torch: derivatives of functions of weights."""

import contextlib
import warnings
from collections.abc import Callable

import keras
import torch

from keras_infomcr.backend.torch.control_flow import as_tensor, batch_size
from keras_infomcr.keras_internals import get_keras_mask, set_keras_mask


def value_and_grad(function: Callable) -> Callable:
    """Return `f(weights, *args) -> ((value, auxiliary), gradients)`."""

    def differentiated(weights, *args):
        with _true_float32(), torch.enable_grad():
            weights = _leaves(weights)
            value, auxiliary = function(weights, *args)
            found = gradients(value, weights)
        return _detached((value, auxiliary)), found

    return differentiated


def value_grad_and_hessian_product(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> ((value, auxiliary), gradients, products)`."""

    @torch.compiler.disable  # compiled functions have no second derivative
    def product(weights, vector, *args):
        with _true_float32(), torch.enable_grad(), _second_derivatives_possible():
            weights = _leaves(weights)
            value, auxiliary = function(weights, *args)
            found = gradients(value, weights, create_graph=True)
            # The derivative of g . v, with v constant, is H v.
            products = gradients(_dot(found, vector or found), weights)
        return _detached((value, auxiliary)), _detached(found), products

    return product


def linearized_gradient(function: Callable) -> Callable:
    """Return `f(weights, *args) -> (gradients, product)`."""

    @torch.compiler.disable  # compiled functions have no second derivative
    def linearize(weights, *args):
        with _true_float32(), torch.enable_grad(), _second_derivatives_possible():
            weights = _leaves(weights)
            found = gradients(function(weights, *args)[0], weights, create_graph=True)

        @torch.compiler.disable
        def product(vector):
            with _true_float32(), torch.enable_grad():
                return gradients(_dot(found, vector), weights, retain_graph=True)

        return _detached(found), product

    return linearize


def curvature_gradient(function: Callable) -> Callable:
    """Return `f(weights, vector, *args) -> gradients`."""

    @torch.compiler.disable
    def gradient(weights, vector, *args):
        possible = _second_derivatives_possible()
        with _true_float32(), torch.enable_grad(), possible, _LayerNormInSteps():
            weights = _leaves(weights)
            found = gradients(function(weights, *args)[0], weights, create_graph=True)
            products = gradients(_dot(found, vector), weights, create_graph=True)
            return gradients(_dot(products, vector), weights)

    return gradient


def hessian_vector_products(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, vectors, *args) -> products`."""

    def products(weights, vectors, *args):
        with _true_float32(), torch.enable_grad(), _second_derivatives_possible():
            weights = _leaves(weights)
            found = gradients(function(weights, *args), weights, create_graph=True)
            # The gradients that depend on a weight: the others have no second derivatives.
            known = [k for k, g in enumerate(found) if g is not None and g.requires_grad]
            found, vectors = ([some[k] for k in known] for some in (found, vectors))
            of_each = [
                torch.autograd.grad(found, weights, v, retain_graph=True, allow_unused=True)
                for v in zip(*vectors)
            ]
        if not of_each:
            return [None] * len(weights)
        return [None if p[0] is None else torch.stack(p) for p in zip(*of_each)]

    return products


def jacobian(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`."""

    def jacobian_of_batch(weights, context, *args):
        with _true_float32(), torch.enable_grad():
            weights = _leaves(weights)
            values = function(weights, context, *args)
            rows = [gradients(v, weights, retain_graph=True) for v in values]
        zeros = [torch.zeros_like(w) for w in weights]
        rows = [[z if g is None else g for z, g in zip(zeros, row)] for row in rows]
        return values.detach(), [torch.stack(r) for r in zip(*rows)]

    return jacobian_of_batch


def gradients_by_example(function: Callable, compiled: bool = True) -> Callable:
    """Return `f(weights, context, *args) -> (values, rows)`, vectorised where torch can."""
    vectorized, one_by_one = _vectorized(function), jacobian(function)

    def gradients_of_examples(weights, context, *args):
        args = keras.tree.map_structure(as_tensor, args)
        try:
            return vectorized(weights, context, *args)
        except RuntimeError:  # an operation that torch cannot vectorise
            found = [
                one_by_one(
                    weights, context, *keras.tree.map_structure(lambda a, i=i: a[i : i + 1], args)
                )
                for i in range(batch_size(args))
            ]
            values, rows = zip(*found)
            return torch.cat(values), [torch.cat(r) for r in zip(*rows)]

    return gradients_of_examples


def _vectorized(function):
    def vectorized(weights, context, *args):
        def one(weights, args):
            args = keras.tree.map_structure(lambda a: a[None], args)
            return function(weights, context, *args)[0]

        of_all = torch.func.vmap(torch.func.grad_and_value(one), in_dims=(None, 0))
        with _true_float32(), torch.enable_grad(), _AnyMemoryFormat(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            rows, values = of_all([w.detach() for w in weights], args)
        return values, rows

    return vectorized


class _AnyMemoryFormat(torch.overrides.TorchFunctionMode):
    """Take any layout for the one that Keras's convolutions ask for, as `vmap` knows only one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.is_contiguous and "memory_format" in kwargs:
            return True
        return function(*args, **kwargs)


def add_to_gradient(gradient: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """Return gradient + term."""
    return gradient + term


def has_sparse_gradients() -> bool:
    """Return `False`."""
    return False


def interpolated(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return (1 - share) start + share end."""
    return torch.lerp(start, end, keras.ops.cast(share, start.dtype))


def plus_multiple(array: torch.Tensor, factor: float, term: torch.Tensor) -> torch.Tensor:
    """Return array + factor * term."""
    return torch.add(array, term, alpha=factor)


def widest_float() -> str:
    """Return `"float64"`, `"float32"` on devices of Apple, which have no other."""
    device = keras.ops.zeros(()).device.type
    return "float32" if device == "mps" else "float64"


def float64_allowed() -> contextlib.AbstractContextManager:
    """Do nothing: arrays of float64 can always be made."""
    return contextlib.nullcontext()


def low_precision_products() -> bool:
    """Return `False`: TensorFloat-32 is switched off where it matters."""
    return False


def gradients(value: torch.Tensor, weights: list[torch.Tensor], **kwargs) -> list:
    """Return the gradients of a value, `None` by weights that it does not depend on.

    `kwargs` are passed to `torch.autograd.grad`, which leaves the `.grad` of parameters alone.
    """
    needed = [w for w in weights if w.requires_grad]
    if not value.requires_grad or not needed:
        return [None] * len(weights)
    found = iter(torch.autograd.grad(value, needed, allow_unused=True, **kwargs))
    return [next(found) if w.requires_grad else None for w in weights]


def _dot(arrays, constants):
    """Return the scalar product of lists of arrays and `None`, the second held constant."""
    dot = torch.zeros(())
    for a, c in zip(arrays, constants):
        if a is not None:
            dot = dot + (a * c.detach()).sum()
    return dot


def _leaves(weights):
    return [w.detach().requires_grad_() for w in weights]


def _detached(structure):
    return keras.tree.map_structure(_detached_array, structure)


def _detached_array(array):
    if not torch.is_tensor(array):
        return array
    detached = array.detach()
    # Keras keeps the mask as an attribute, which torch does not pass on.
    set_keras_mask(detached, get_keras_mask(array))
    return detached


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


@contextlib.contextmanager
def _second_derivatives_possible():
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


class _LayerNormInSteps(torch.overrides.TorchFunctionMode):
    """Normalise layers in single steps: the third derivatives of torch's own are silently wrong.

    Its second derivatives take the moments for constants.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        axes = tuple(range(-len(normalized_shape), 0))
        centred = input - input.mean(axes, keepdim=True)
        output = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
        output = output if weight is None else output * weight
        return output if bias is None else output + bias
