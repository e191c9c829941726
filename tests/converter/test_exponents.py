"""How often exponents occur, and their entropy: counted and kept exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from df11.converter import kernels
from df11.converter.exponents import COUNTED_WEIGHTS, ExponentCounts, entropy, has_exponents, summarized
from df11.formats import framing, layout
from tests.support import strategies
from tests.support.conversions import numpy_counts, numpy_entropy

COUNTS = st.lists(st.integers(0, 2**40), min_size=256, max_size=256).filter(any)


@given(weights=strategies.weights(70_000))
def test_the_kernel_counts(weights):
    assert np.array_equal(kernels.count_exponents(weights), numpy_counts(weights.tobytes()))


@given(counts=COUNTS)
def test_counts_are_kept_exactly(counts):
    kept = ExponentCounts.of(counts)
    assert kept.array().tolist() == counts
    assert kept.entropy() == entropy(counts) == pytest.approx(numpy_entropy(np.array(counts, float)), abs=1e-8)


@pytest.mark.parametrize(
    ("counts", "bits"), [([7], 0), ([1, 1], 1), ([5, 5, 5, 5], 2), ([2, 1, 1], 1.5), ([1] * 256, 8)]
)
def test_known_entropies(counts, bits):
    assert entropy([0, *counts, 0]) == bits


@given(counts=COUNTS)
def test_what_is_kept_of_a_tensor(counts):
    array = np.array(counts, np.int64)
    assert COUNTED_WEIGHTS == 65_536
    assert summarized(array, COUNTED_WEIGHTS) == ExponentCounts.of(counts)
    assert summarized(array, COUNTED_WEIGHTS - 1) == entropy(counts)


@pytest.mark.parametrize("dtype", sorted(framing.DTYPE_BITS))
def test_which_tensors_have_exponents(dtype):
    most = layout.MAX_RECORD_WEIGHTS
    found = [has_exponents("verbatim", dtype, elements) for elements in (0, 1, most, most + 1)]
    assert found == [False, dtype == "BF16", dtype == "BF16", False]
    assert has_exponents("df11", dtype, 1)
