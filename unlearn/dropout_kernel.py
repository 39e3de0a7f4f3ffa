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


@torch.library.custom_op("unlearn::drop", mutates_args=())
def drop(x: Tensor, keys: Tensor, dropout: float) -> Tensor:
    """`seeding.dropped` of `x` [B, S, F] with keys int32 [B]; its gradient is dropped by the same mask.

    An operator of its own, so that a compiled block calls it as it is.
    """
    x, (_, positions, features) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    rows = x.shape[0] * positions
    _drop[(rows, triton.cdiv(features, BLOCK))](x, out, keys, positions, features, int(dropout * 2**31), block=BLOCK)
    return out


@drop.register_fake
def _like(x: Tensor, keys: Tensor, dropout: float) -> Tensor:
    return torch.empty_like(x.contiguous())


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, keys, ctx.dropout = inputs
    ctx.save_for_backward(keys)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (keys,) = ctx.saved_tensors
    return drop(gradient, keys, ctx.dropout), None, None


drop.register_autograd(_backward, setup_context=_remember)
