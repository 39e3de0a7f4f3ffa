"""The dropout kernel's bits, in Triton's interpreter on the CPU, which a process is told of before it starts."""

import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from unlearn.dropout_kernel import drop
from unlearn.seeding import keep_mask

for dtype in (torch.float32, torch.bfloat16):
    for rows, positions, features, dropout in ((2, 7, 1500, 0.2), (3, 5, 1, 0.5), (1, 1, 1024, 0.05)):
        x = torch.randn(rows, positions, features, dtype=dtype, requires_grad=True)
        keys = torch.randint(0, 2**31 - 1, (rows,))
        found, mask = drop(x, keys.int(), dropout), keep_mask(keys, positions, features, dropout)
        upstream = torch.randn_like(found)
        found.backward(upstream)
        assert torch.equal(found, x * mask) and torch.equal(x.grad, upstream * mask), (dtype, rows, positions, features)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton comes with torch's CUDA builds alone")
def test_the_kernel_drops_what_the_mask_drops() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
