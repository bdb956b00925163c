"""The one table of tolerances: equality is claimed in float64, the others say how far rounding may carry."""

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 2e-2},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1},
}


def assert_close(
    actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """Compare shapes, dtypes and values, to the tolerance of ``dtype``, that of ``actual`` if None."""
    dtype = dtype or (actual if isinstance(actual, Tensor) else actual[0]).dtype
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])
