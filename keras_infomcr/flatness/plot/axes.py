"""What all pictures need: a result of the right kind, and axes to draw on."""

from collections.abc import Sequence
from typing import Any


def check_result(result: Any, kind: type | tuple[type, ...], measures: str) -> None:
    """Refuse a result of another kind than a picture draws.

    Args:
        result: What the user has given.
        kind: The class of the results, or several.
        measures: String, the calls that give such results.
    """
    if isinstance(result, kind):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(f"`{k.__name__}`" for k in kinds)
    raise TypeError(
        f"`result` must be a {names}. Received: result={result!r} (of type {type(result)}). "
        f"Pass the result of {measures}."
    )


def check_labels(labels: Sequence[Any] | None, results: Sequence[Any]) -> list[str]:
    """Return a label for each result, its number unless labels are given; there must be as many."""
    found = [str(k + 1) for k in range(len(results))] if labels is None else list(map(str, labels))
    if not results or len(found) != len(results):
        raise ValueError(
            "There must be a result at least, and as many `labels` as results. "
            f"Received: labels={labels!r}, {len(results)} results"
        )
    return found


def new_axes(width: float = 6.0, height: float = 3.5, **kwargs: Any) -> Any:
    """Return axes on a figure of their own, sized in inches."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`keras_infomcr.flatness.plot` needs matplotlib. Run `pip install matplotlib`."
        ) from error
    return pyplot.subplots(figsize=(width, height), layout="constrained", subplot_kw=kwargs)[1]
