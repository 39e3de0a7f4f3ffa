"""Randomness that depends on what is computed, never on which rank computes it.

Two kinds: seeds derived from a few words and numbers (permutations, initial weights), and counter-based random bits,
a hash of (row key, position, feature), which are the same wherever a row is computed and however it is padded.
"""

import hashlib
from importlib.util import find_spec

import torch
from torch import Tensor

# Multipliers of the 32-bit finaliser "lowbias32", https://nullprogram.com/blog/2018/07/31/
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - (1 << 32)
_CHUNK = 1 << 24  # numbers hashed at once by `keep_mask`: 64 MiB a temporary
_GOLDEN = 0x9E3779B9 - (1 << 32)


def derive(*parts: int | str) -> int:
    """A seed in 0..2**31-1 from words and numbers, e.g. `derive(seed, "order", epoch)`; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))


def random_bits(keys: Tensor, positions: int, features: int = 1, *, first: int = 0) -> Tensor:
    """Independent 31-bit integers for every (row, position, feature).

    Args:
        keys: int64 [B], one key a row, in 0..2**31-1.
        positions, features: S and F. first: the position of the first one.

    Returns:
        int32 [B, S, F], uniform in 0..2**31-1. Value [b, s, f] depends on keys[b], s and f alone.
    """
    device = keys.device
    position = torch.arange(first, first + positions, dtype=torch.int32, device=device)
    feature = torch.arange(features, dtype=torch.int32, device=device)
    rows = _mix(keys.to(torch.int32)[:, None] ^ _mix(position * _GOLDEN + 1)[None, :])  # [B, S]
    return _mix(rows[:, :, None] ^ _mix(feature * _GOLDEN + 2)[None, None, :]) & 0x7FFFFFFF


def keep_mask(keys: Tensor, positions: int, features: int, dropout: float) -> Tensor:
    """Bool [B, S, F], False with probability `dropout`: `random_bits` against a threshold, a few positions at a time,
    because the bits take four times the memory of the numbers they decide on."""
    keep = torch.empty(len(keys), positions, features, dtype=torch.bool, device=keys.device)
    chunk = max(1, _CHUNK // features)
    for start in range(0, positions, chunk):
        part = slice(start, start + chunk)
        for row in range(len(keys)):
            bits = random_bits(keys[row : row + 1], min(chunk, positions - start), features, first=start)
            torch.ge(bits, int(dropout * 2**31), out=keep[row : row + 1, part])
    return keep


def dropped(x: Tensor, keys: Tensor, dropout: float) -> Tensor:
    """`x` [B, S, F] with the numbers set to 0 that `keep_mask` drops; on CUDA by one kernel, with the same bits.

    Args:
        keys: int64 [B], in 0..2**31-1.
    """
    if x.is_cuda and _has_triton():
        from unlearn.dropout_kernel import drop

        kept: Tensor = drop(x, keys.to(torch.int32), dropout)
        return kept
    return x * keep_mask(keys, x.shape[1], x.shape[2], dropout)


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _mix(bits: Tensor) -> Tensor:
    """Hash int32 values in wrapping arithmetic (arithmetic shifts are masked to logical ones)."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _MULTIPLY_1
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * _MULTIPLY_2
    return bits ^ ((bits >> 16) & 0xFFFF)
