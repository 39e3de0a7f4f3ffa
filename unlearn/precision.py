"""Which dtype a forward pass computes in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Precision = Callable[[], AbstractContextManager[object]]  # a factory of contexts for forward passes
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def autocast(master: torch.dtype, compute: torch.dtype, device: torch.device) -> Precision:
    """A factory of contexts in which weights of dtype `master` compute in `compute`; empty ones where both agree."""
    if master == compute:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=compute)
