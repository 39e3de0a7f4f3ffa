"""The dropout of `seeding.dropped` as one Triton kernel: the mask is hashed where it is used, and never stored.

As a chain of tensor operations it is some fifteen passes over [B, S, F] for every adapted layer, and again for each
recomputation: half of a LoRA step's time on an H200. Triton comes with torch's CUDA builds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of one program


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    """`seeding._mix`."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * -0x7B935975
    return bits ^ ((bits >> 16) & 0xFFFF)


@triton.jit
def _drop(x, out, keys, positions, features, threshold, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (r, c): block c of the features of row r, which is position r % S of batch row r // S."""
    row = tl.program_id(0)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    inside = feature < features
    hashed = _mix(tl.load(keys + row // positions) ^ _mix((row % positions) * -0x61C88647 + 1))
    bits = _mix(hashed ^ _mix(feature * -0x61C88647 + 2)) & 0x7FFFFFFF
    place = row.to(tl.int64) * features + feature
    value = tl.load(x + place, mask=inside)
    tl.store(out + place, tl.where(bits >= threshold, value, 0.0), mask=inside)


def _apply(x: Tensor, keys: Tensor, dropout: float) -> Tensor:
    """`x` [B, S, F] with the numbers set to 0 that `seeding.keep_mask` drops. keys: int32 [B]."""
    x, (_, positions, features) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    rows = x.shape[0] * positions
    _drop[(rows, triton.cdiv(features, BLOCK))](x, out, keys, positions, features, int(dropout * 2**31), block=BLOCK)
    return out


class Dropped(torch.autograd.Function):
    """`seeding.dropped`, whose gradient is dropped by the same mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, dropout: float) -> Tensor:
        """x: [B, S, F]. keys: int32 [B]."""
        ctx.save_for_backward(keys)
        ctx.dropout = dropout
        return _apply(x, keys, dropout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `x`."""
        (keys,) = ctx.saved_tensors
        return _apply(gradients[0], keys, ctx.dropout), None, None
