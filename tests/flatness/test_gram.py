"""Products of rows with each other against NumPy's."""

import numpy as np
import pytest
from frameworks import numpy
from keras import ops

from keras_infomcr.flatness.per_example import gram


@pytest.mark.parametrize("num_rows", [3, 4, 6, 12, 13])
def test_rows_in_strips(float64, rng, monkeypatch, num_rows):
    """Strips of four rows, products of five columns at a time."""
    monkeypatch.setattr(gram, "_NUM_ROWS", 4)
    monkeypatch.setattr(gram, "_NUM_COLUMNS", 5)
    rows = rng.normal(size=(num_rows, 13))
    found = numpy(gram.gram(ops.convert_to_tensor(rows)))
    # A sum of 13 products rounds by at most 13 units of the sum of their absolute values.
    atol = 13 * np.finfo("float64").eps * np.max(np.abs(rows) @ np.abs(rows.T))
    np.testing.assert_allclose(found, rows @ rows.T, rtol=0, atol=2 * atol)
    np.testing.assert_array_equal(found[:4, 4:], found[4:, :4].T)
