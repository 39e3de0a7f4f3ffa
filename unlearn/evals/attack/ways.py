"""Ways to what a model still knows that train nothing: its weights rounded, pruned, or moved back to the original.

Each way changes the matrices inside the blocks, in place, of a model that is whole on every rank; they are put back
after it was measured. What comes back under one of them was never erased.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.model import blocks

ROUNDED = (8, 4)  # bits
PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of each matrix
TOWARDS = (0.25, 0.5, 0.75)  # shares of the original
GROUP = 64  # numbers of one row that share a scale, as in bitsandbytes' 4-bit kinds


@dataclass(frozen=True)
class Way:
    """A change of one matrix [outputs, inputs], float32, given that of the original, if there is one."""

    name: str
    change: Callable[[Tensor, Tensor | None], Tensor]


def ways(original: bool) -> list[Way]:
    """All of them; those towards the original only where it is at hand."""
    rounding = [Way(f"{bits} bits", partial(rounded, bits=bits)) for bits in ROUNDED]
    pruning = [Way(f"{share:.0%} pruned", partial(pruned, share=share)) for share in PRUNED]
    back = [Way(f"{share:.0%} original", partial(moved, share=share)) for share in TOWARDS]
    return [*rounding, *pruning, *(back if original else [])]


def moved(matrix: Tensor, original: Tensor | None, share: float) -> Tensor:
    """Moved towards the original by a share of the way."""
    assert original is not None, "this way is taken only where there is an original"
    return matrix.lerp(original, share)


def rounded(matrix: Tensor, original: Tensor | None = None, *, bits: int, group: int = GROUP) -> Tensor:
    """Rounded to the nearest of 2^bits - 1 levels between the greatest of each group of inputs and its negative.

    Zhang et al. 2024, https://arxiv.org/abs/2410.16454: rounding to 4 bits brings back what an update was too small to
    move over a level.
    """
    rows, columns = matrix.shape
    padded = nn.functional.pad(matrix, (0, -columns % group)).view(rows, -1, group)
    levels = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(dim=-1, keepdim=True) / levels
    whole = torch.where(scale > 0.0, (padded / scale).round() * scale, 0.0)
    return whole.view(rows, -1)[:, :columns]


def pruned(matrix: Tensor, original: Tensor | None = None, *, share: float) -> Tensor:
    """With the smallest `share` of its numbers, by magnitude, set to 0."""
    count = int(share * matrix.numel())
    if count == 0:
        return matrix
    smallest = matrix.abs().flatten().sort().values[count - 1]  # kthvalue has no deterministic kernel on a GPU
    return torch.where(matrix.abs() > smallest, matrix, 0.0)


@contextmanager
@torch.no_grad()
def taken(way: Way, model: PreTrainedModel, original: PreTrainedModel | None) -> Iterator[None]:
    """The model with a way taken, for the length of the block."""
    matrices = _matrices(model)
    originals = [None] * len(matrices) if original is None else _matrices(original)
    kept = [matrix.clone() for matrix in matrices]
    try:
        for matrix, other in zip(matrices, originals, strict=True):
            matrix.copy_(way.change(matrix.float(), None if other is None else other.float()))
        yield
    finally:
        for matrix, before in zip(matrices, kept, strict=True):
            matrix.copy_(before)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the linear layers inside the blocks, [outputs, inputs]."""
    layers = [layer for layer in blocks(model).modules() if isinstance(layer, (nn.Linear, Conv1D))]
    return [layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach() for layer in layers]
