"""Layers that compute something once, for all examples: embeddings of positions, mostly.

Their gradients by single examples come from a backward pass only if each example has outputs of its
own, equal to the copies of all others. Whether a model takes them, and keeps them apart, is tried.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from keras import ops

from keras_infomcr.flatness.per_example.calls import Calls, calls_before_activations
from keras_infomcr.flatness.per_example.taps import Taps, repeated


def with_shared_outputs(taps: Taps, evaluation: Callable) -> Taps:
    """Return taps of the layers in `taps.shared` too, unless the model does not allow for that.

    The outputs that are repeated for one of two examples are changed: the other must not notice.

    Args:
        taps: `Taps`.
        evaluation: Function of no arguments. It returns a context, which yields the
            `keras.StatelessScope` of an evaluation of two examples, and a function of no arguments
            that returns their values, an array `[2]`.
    """
    calls, values = Calls(), []
    try:
        for changed in (None, 0, 1):
            with evaluation() as (scope, evaluate), _shared_outputs(taps, changed):
                with calls.noting(taps.kinds, scope, 2):
                    values.append(ops.convert_to_numpy(evaluate()))
    except Exception:  # a shape that does not fit
        return taps.without_shared()
    for changed, other in ((0, 1), (1, 0)):
        before, after = values[0][other], values[1 + changed][other]
        same = np.isclose(before, after, rtol=1e-3, atol=1e-3)
        if not same or calls.differ(0, 1 + changed, other):
            return taps.without_shared()
    return taps.with_shared()


@contextlib.contextmanager
def _shared_outputs(taps: Taps, changed: int | None) -> Iterator[None]:
    """Repeat what layers compute for two examples, and change it for one of them."""

    def repeating(layer, call):
        def repeated_call(*args, **kwargs):
            outputs = repeated(call(*args, **kwargs), taps.shared[layer].outputs, 2)
            return ops.stack([1.5 * x + 0.5 if i == changed else x for i, x in enumerate(outputs)])

        return repeated_call

    if changed is None:
        yield
        return
    with calls_before_activations(taps.shared, repeating):
        yield
