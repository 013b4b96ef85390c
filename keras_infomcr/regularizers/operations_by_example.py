"""Which operations of `keras.ops` map each example of a batch by itself.

The examples lie along the first axis of every symbolic tensor of a graph. The arguments of a call
must show that it leaves this axis alone; what they do not show is not known.
"""

import math
from collections.abc import Callable
from typing import Any

import keras

from keras_infomcr.keras_internals import Call, get_keras_mask, operation_name

# Each number of the result depends on the numbers in its place alone.
_ELEMENTWISE = frozenset(
    """
    Absolute Abs Fabs Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh Cbrt Ceil Clip Cos Cosh
    Deg2rad Exp Exp2 Expm1 Floor Isfinite Isinf Isnan Log Log10 Log1p Log2 LogicalNot NanToNum
    Negative Rad2deg Reciprocal Round Sign Signbit Sin Sinc Sinh Sqrt Square Tan Tanh Trunc Add
    Divide DivideNoNan Equal FloorDivide Greater GreaterEqual Hypot Less LessEqual Logaddexp
    LogicalAnd LogicalOr LogicalXor Maximum Minimum Mod Multiply NotEqual Power Subtract TrueDivide
    Where FullLike OnesLike ZerosLike Cast StopGradient Copy Rsqrt Erf Erfc Erfinv Celu Elu Gelu
    HardShrink HardSigmoid HardSilu HardTanh LeakyRelu LogSigmoid Relu Relu6 Selu Sigmoid Silu
    SoftShrink Softplus Softsign SparsePlus SparseSigmoid Squareplus TanhShrink Threshold
    """.split()
)
# They work along the axes that they have as attributes, the latter along axes of their result.
_ALONG_AXES = frozenset(
    """
    All Amax Amin Any Argmax Argmin Argsort Concatenate CountNonzero Cumprod Cumsum Diff Flip Glu
    Logsumexp LogSoftmax Max Mean Median Min Moveaxis Normalize Prod Repeat Roll Softmax Sort
    Sparsemax Split Squeeze Std Sum Swapaxes Var
    """.split()
)
_ALONG_NEW_AXES = frozenset(("ExpandDims", "OneHot", "Stack"))
_AXES = ("axis", "axis1", "axis2", "source", "destination")
# They never return the very array that they are given, with its mask.
_MAKES_NEW = frozenset(("Add", "Subtract", "Multiply", "Divide", "TrueDivide"))


def within_examples(axes: Any, rank: int = 2) -> bool:
    """Return whether axes are known not to be the first of a tensor.

    Args:
        axes: Integer, perhaps negative, or a structure of integers. `None` stands for all axes.
        rank: Integer, the least number of axes that the tensor can have.
    """
    flat = keras.tree.flatten(axes)
    return all(isinstance(a, int) and (a > 0 or -rank < a < 0) for a in flat)


def is_elementwise(function: Any) -> bool:
    """Return whether a function is one of `keras.ops` that maps each number by itself."""
    name = getattr(function, "__name__", "")
    if getattr(keras.ops, name, None) is not function:
        return False
    return "".join(word.title() for word in name.split("_")) in _ELEMENTWISE


def maps_by_example(call: Call) -> bool:
    """Return whether a call of an operation of `keras.ops` maps each example by itself."""
    name = operation_name(call.operation)
    if name is None or any(not t.shape or t.shape[0] is not None for t in call.outputs):
        return False
    tensors = [t for t in keras.tree.flatten(call.arguments) if isinstance(t, keras.KerasTensor)]
    if name not in _MAKES_NEW and any(get_keras_mask(t) is not None for t in tensors):
        return False
    if name in _ELEMENTWISE:
        return _lies_in_place(call)
    if name in _ALONG_AXES:
        return _leaves_first_axis(call, 0)
    if name in _ALONG_NEW_AXES:
        return _leaves_first_axis(call, 1)
    check = _CHECKS.get(name)
    return check is not None and check(call.operation, call.arguments, call.outputs)


def _lies_in_place(call):
    """Return whether examples meet only themselves when arrays are broadcast."""
    rank = len(call.outputs[0].shape)
    if any(map(_shape, vars(call.operation).values())):  # such as an array of bounds of `clip`
        return False
    for array in call.arguments:
        shape = _shape(array)
        if isinstance(array, (list, tuple)):
            return False
        if isinstance(array, keras.KerasTensor):
            if len(shape) != rank:
                return False
        elif len(shape) > rank or (len(shape) == rank and shape[0] != 1):
            return False
    return True


def _leaves_first_axis(call, num_new):
    arrays = [a for a in keras.tree.flatten(call.arguments) if a is not None]
    ranks = {len(a.shape) if isinstance(a, keras.KerasTensor) else None for a in arrays}
    axes = [getattr(call.operation, name) for name in _AXES if hasattr(call.operation, name)]
    if len(ranks) != 1 or None in ranks or not axes:
        return False
    return within_examples(axes, *(rank + num_new for rank in ranks))


def _shape(array):
    return tuple(getattr(array, "shape", ()))


def _reshape(operation, arguments, outputs):
    before, after = arguments[0].shape[1:], outputs[0].shape[1:]
    return None not in (*before, *after) and math.prod(before) == math.prod(after)


def _pad(operation, arguments, outputs):
    widths = operation.pad_width
    of_each_axis = isinstance(widths, (list, tuple)) and len(widths) == len(outputs[0].shape)
    return of_each_axis and list(widths[0]) == [0, 0]


def _transpose(operation, arguments, outputs):
    return operation.axes is not None and operation.axes[0] == 0


def _getitem(operation, arguments, outputs):
    array, key = arguments
    first, *others = key if isinstance(key, tuple) else (key,)
    if not all(k is None or isinstance(k, (int, slice)) for k in others):
        return False
    if first is Ellipsis:
        return len([k for k in others if k is not None]) < len(array.shape)
    return isinstance(first, slice) and first == slice(None)


def _matmul(operation, arguments, outputs):
    first, second = (len(_shape(a)) for a in arguments)
    given = [isinstance(a, keras.KerasTensor) for a in arguments]
    if all(given):
        return first == second >= 3
    return first >= 2 >= second if given[0] else second >= 3 > first


def _einsum(operation, arguments, outputs):
    terms, arrow, result = operation.subscripts.replace(" ", "").partition("->")
    batch = result[:1]
    if not arrow or not batch.isalpha() or "." in terms or result.count(batch) > 1:
        return False
    return all(
        term[:1] == batch and batch not in term[1:]
        if isinstance(array, keras.KerasTensor)
        else batch not in term
        for term, array in zip(terms.split(","), arguments)
    )


_CHECKS: dict[str, Callable[[Any, list, list], bool]] = {
    "Einsum": _einsum,
    "GetItem": _getitem,
    "Matmul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Transpose": _transpose,
}
