"""The log-determinant of a Gram matrix of gradients."""

import numpy as np


def log_determinant(gram, row_epsilon, num_weights):
    """Compute ln|G| of a Gram matrix G = J J^T and say why it is not finite, if so.

    The rows are scaled to norm 1 first: ln|G| = 2 sum_i ln||J_i|| + ln|C|, C their cosines.

    Args:
        gram: Array `[N, N]`, float64.
        row_epsilon: Float, the rounding unit of the rows J_i.
        num_weights: Integer, the length of the rows.

    Returns:
        Tuple of ln|G| (natural logarithm, -inf if G is singular, NaN if it holds NaN or
        infinity) and the cause, a string, empty where the value is finite.
    """
    norms = np.sqrt(np.diag(gram))
    if not np.all(np.isfinite(gram)):
        bad = np.flatnonzero(~np.isfinite(norms))
        return np.nan, f"gradients are not finite (examples {_listed(bad)} of the trial)"
    if not np.all(norms):
        return -np.inf, f"examples {_listed(np.flatnonzero(norms == 0))} have no gradient"
    cosines = gram / np.outer(norms, norms)
    eigenvalues = np.linalg.eigvalsh(cosines)
    # Rounding the rows moves singular values of a matrix of unit rows by sqrt(N) row_epsilon,
    # rounding the Gram matrix moves its eigenvalues by N times the unit of float64.
    floor = len(gram) * max(row_epsilon**2, np.finfo(np.float64).eps)
    if eigenvalues[0] <= floor:
        return -np.inf, _cause_of_singularity(cosines, num_weights)
    return 2 * np.sum(np.log(norms)) + np.sum(np.log(eigenvalues)), ""


def _cause_of_singularity(cosines, num_weights):
    size = len(cosines)
    if num_weights < size:
        return f"there are fewer weights ({num_weights}) than examples ({size})"
    parallel = np.argwhere(np.triu(np.abs(cosines) > 1 - 1e-6, k=1))
    if len(parallel):
        first, second = parallel[0]
        repeated = len(np.unique(parallel[:, 1]))
        return (
            f"{repeated} of the {size} examples of the trial have a gradient parallel to an "
            f"earlier one's, such as examples {first} and {second}: they are duplicates, or look "
            "alike to the model. Take duplicates out of the data, or lower `num_examples`"
        )
    return "the gradients of the examples are linearly dependent"


def _listed(indices):
    return ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
